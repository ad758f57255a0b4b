"""Tokenizers: a model's own, and a built-in one of bytes that needs no file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.location import locate
from ssmlora_dist.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = "bytes"
NUM_BYTES = 256
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BYTES_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def load_tokenizer(
    path: str,
    revision: str | None = None,
    *,
    num_embeddings: int | None = None,
    where: str = "model.tokenizer",
    warn: Callable[[str], object] = warnings.warn,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, set up for training: it has a padding token and pads on the right.

    Without a padding token of its own, or with one that the model lacks, it pads with its end-of-sequence
    token; no token is ever added.

    Args:
        path: a directory, a hub name, or `bytes` for the built-in tokenizer.
        revision: on the hub.
        num_embeddings: rows of the model's embedding, which every id must be one of; None compares nothing.
        where: dotted path of the setting that named it, for messages.
        warn: told what was replaced.

    Raises:
        ModelError: there is none, it cannot be read, it has no token to pad with, or tokens that the model
            lacks.
    """
    tokenizer = _bytes_tokenizer() if path == BYTES else _read(path, revision, where)
    if num_embeddings is not None:
        _fit(tokenizer, path, num_embeddings, where, warn)
    return tokenizer


def _read(path: str, revision: str | None, where: str) -> PreTrainedTokenizerBase:
    directory = locate(path, revision, weights=False, where=where)
    try:
        with progress("loading the tokenizer"):
            from transformers import AutoTokenizer

            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False
            )
    # Between a missing file, broken JSON and a missing package, every tokenizer raises its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{where}: no tokenizer can be read from {path} ({type(error).__name__}: {reason}); "
            f'name a directory or hub model that has one, or "{BYTES}"'
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"{where}: the tokenizer of {path} has no padding and no end-of-sequence token; "
                "set `eos_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _fit(
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    num_embeddings: int,
    where: str,
    warn: Callable[[str], object],
) -> None:
    """Sees to it that every id is a row of the embedding; only padding, which nobody reads, is replaced."""
    pad_token, pad_token_id, eos_token = tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token
    is_padding_alone = list(_beyond(tokenizer, num_embeddings)) == [pad_token]
    if is_padding_alone and eos_token not in (None, pad_token):
        _forget(tokenizer, pad_token)
    beyond = _beyond(tokenizer, num_embeddings)
    if beyond:
        shown = [f"{token!r} ({beyond[token]})" for token in sorted(beyond, key=lambda token: beyond[token])]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        raise ModelError(
            f"{where}: the tokenizer of {path} has ids up to {max(beyond.values())}, and the embedding "
            f"{num_embeddings} rows (`vocab_size`): it lacks {', '.join(shown[:3])}{more}; name the model's "
            "own tokenizer, take the tokens out of it, or name a model whose embedding was extended"
        )
    if tokenizer.pad_token != pad_token:
        warn(
            f"{where}: the padding token {pad_token!r} of {path} has the id {pad_token_id}, and the model's "
            f"embedding {num_embeddings} rows; padded with {eos_token!r} instead"
        )


def _beyond(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> dict[str, int]:
    return {token: index for token, index in tokenizer.get_vocab().items() if index >= num_embeddings}


def _forget(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Takes an added token out, so that a text that spells it is text, and pads with the end of sequence."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return
    content = json.loads(backend.to_str())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] != token]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pad_token = tokenizer.eos_token


def _bytes_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte of UTF-8, its id the byte's value; then the three special tokens.

    Any text that does not spell out a special token comes back as it was.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=BYTES_CHAT_TEMPLATE,
    )


def _byte_symbols() -> list[str]:
    """The character that stands for each byte: its own where Latin-1 prints it, else one from U+0100 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    hidden = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(NUM_BYTES + hidden.index(byte)) for byte in range(NUM_BYTES)
    ]
