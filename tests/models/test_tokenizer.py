"""Tokenizers: set up for training without touching the vocabulary; the built-in one of bytes."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_tokenizer


def save_word_tokenizer(directory: Path, **special_tokens: str) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", padding_side="left", **special_tokens
    )
    saved.save_pretrained(directory)
    return len(saved)


def test_padding_uses_the_end_token_and_the_vocabulary_stays(tmp_path: Path) -> None:
    size = save_word_tokenizer(tmp_path, eos_token="</s>")
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 1)
    assert len(tokenizer) == size
    assert tokenizer(["a", "a b"], padding=True)["input_ids"] == [[2, 1], [2, 3]]


def test_a_padding_token_of_its_own_is_kept(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path, eos_token="</s>", pad_token="<unk>")
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0


def test_nothing_to_pad_with_is_refused(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=r"model\.tokenizer: .*no end-of-sequence token; set `eos_token`"):
        load_tokenizer(str(tmp_path))


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.tokenizer: no tokenizer can be read from"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match='name a directory or hub model that has one, or "bytes"'):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["", "plain", "  two  spaces\n\ttab\r\n", "déjà vu – 漢字 🧪", "\x00\x7f\u200b\ufeff", " a.b ,c !", "\n"],
)
def test_bytes_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_round_trip_of_random_text() -> None:
    seed = 11
    print(f"seed {seed}")
    rng = random.Random(seed)
    tokenizer = load_tokenizer("bytes")
    planes = [(0x0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    for _ in range(50):
        text = "".join(chr(rng.randint(*rng.choice(planes))) for _ in range(40))
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_bytes_special_tokens_and_padding() -> None:
    tokenizer = load_tokenizer("bytes")
    assert len(tokenizer) == 259
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert tokenizer(["ab", "c"], padding=True)["input_ids"] == [[97, 98], [99, 258]]
    assert tokenizer.decode([97, 257, 258], skip_special_tokens=True) == "a"


def test_bytes_chat_template() -> None:
    tokenizer = load_tokenizer("bytes")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "user: Hi\nassistant: Yes<|eos|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]


def save_bpe(directory: Path, *added: str, **special_tokens: str) -> None:
    """The tokenizer of bytes with more tokens, the first of which gets the id 259."""
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(list(added), special_tokens=True)
    for role, token in special_tokens.items():
        setattr(tokenizer, role, token)
    tokenizer.save_pretrained(directory)


def test_a_padding_token_beyond_the_embedding_is_replaced_and_that_is_said(tmp_path: Path) -> None:
    save_bpe(tmp_path, "[PAD]", pad_token="[PAD]")
    warnings: list[str] = []
    tokenizer = load_tokenizer(str(tmp_path), num_embeddings=259, warn=warnings.append)
    assert (tokenizer.pad_token_id, max(tokenizer.get_vocab().values())) == (257, 258)
    # Spelled in a text it is text.
    assert tokenizer("a[PAD]")["input_ids"] == list(b"a[PAD]")
    assert tokenizer(["ab", "c"], padding=True)["input_ids"] == [[97, 98], [99, 257]]
    assert warnings == [
        f"model.tokenizer: the padding token '[PAD]' of {tmp_path} has the id 259, and the model's embedding "
        "259 rows; padded with '<|eos|>' instead"
    ]
    kept = load_tokenizer(str(tmp_path), num_embeddings=260, warn=warnings.append)
    assert (kept.pad_token_id, kept("[PAD]")["input_ids"], len(warnings)) == (259, [259], 1)


@pytest.mark.parametrize(
    ("added", "special_tokens"),
    [
        (("<|im_start|>",), {}),
        (("[PAD]", "<|im_start|>"), {"pad_token": "[PAD]"}),
        (("<|end|>",), {"eos_token": "<|end|>"}),
        (("<|end|>",), {"eos_token": "<|end|>", "pad_token": "<|end|>"}),
        (("<|begin|>",), {"bos_token": "<|begin|>"}),
    ],
)
def test_other_tokens_beyond_the_embedding_are_refused(
    added: tuple[str, ...], special_tokens: dict[str, str], tmp_path: Path
) -> None:
    save_bpe(tmp_path, *added, **special_tokens)
    with pytest.raises(ModelError, match=rf"model\.tokenizer: .*259 rows.*{re.escape(added[-1])}"):
        load_tokenizer(str(tmp_path), num_embeddings=259)


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path, eos_token="</s>")
    with pytest.raises(
        ModelError, match=r"ids up to 3, .* 3 rows.*lacks 'b' \(3\); name the model's own tokenizer"
    ):
        load_tokenizer(str(tmp_path), num_embeddings=3)
    save_word_tokenizer(tmp_path, eos_token="</s>", pad_token="b")
    with pytest.raises(ModelError, match=r"'b' \(3\)"):
        load_tokenizer(str(tmp_path), num_embeddings=3)
    assert len(load_tokenizer(str(tmp_path), num_embeddings=4)) == 4
