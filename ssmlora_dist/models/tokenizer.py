"""Tokenizers: a model's own, and a built-in one of bytes that needs no file."""

from __future__ import annotations

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


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, set up for training: it has a padding token and pads on the right.

    Without a padding token of its own it pads with its end-of-sequence token; the vocabulary never changes.

    Args:
        path: a directory, a hub name, or `bytes` for the built-in tokenizer.
        revision: on the hub.

    Raises:
        ModelError: there is none, it cannot be read, or it has no token to pad with.
    """
    if path == BYTES:
        return _bytes_tokenizer()
    directory = locate(path, revision, weights=False, place="model.tokenizer")
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
            f"model.tokenizer: no tokenizer can be read from {path} ({type(error).__name__}: {reason}); "
            f'name a directory or hub model that has one, or "{BYTES}"'
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"model.tokenizer: the tokenizer of {path} has no padding and no end-of-sequence token; "
                "set `eos_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


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
