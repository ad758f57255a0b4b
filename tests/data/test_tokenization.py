"""The encoder: what goes around a text, and text that follows another."""

from __future__ import annotations

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.tokenization import TextEncoder, check_text, end_token_ids


def test_begins_a_sequence_as_the_tokenizer_does(byte_tokenizer, bpe_tokenizer):
    assert TextEncoder(byte_tokenizer).bos_ids == []
    assert TextEncoder(bpe_tokenizer).bos_ids == [bpe_tokenizer.bos_token_id]


def test_a_continuation_brings_no_space_of_its_own(sentencepiece_tokenizer):
    encoder = TextEncoder(sentencepiece_tokenizer)
    ids = (
        encoder.encode("The name")
        + encoder.encode_continuation("s of the")
        + encoder.encode_continuation(" set")
    )
    assert sentencepiece_tokenizer.decode(ids) == " The names of the set"
    assert encoder.encode_continuation("s") != encoder.encode("s")


@pytest.mark.parametrize("text", ["", "s of the set", " 48213", "\nnew line"])
def test_a_continuation_is_plain_where_texts_begin_plainly(bpe_tokenizer, text):
    encoder = TextEncoder(bpe_tokenizer)
    assert encoder.encode_continuation(text) == bpe_tokenizer(text, add_special_tokens=False)["input_ids"]


def test_no_end_of_sequence_token(byte_tokenizer):
    byte_tokenizer = byte_tokenizer.__class__(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match=r"model\.tokenizer.*eos_token"):
        _ = TextEncoder(byte_tokenizer).eos_id


def test_a_prompt_begins_once(byte_tokenizer, bpe_tokenizer):
    assert TextEncoder(bpe_tokenizer).begin("set") == bpe_tokenizer("set")["input_ids"]
    assert TextEncoder(bpe_tokenizer).begin("<|bos|>set") == bpe_tokenizer("set")["input_ids"]
    assert TextEncoder(byte_tokenizer).begin("ab") == byte_tokenizer("ab")["input_ids"]


def test_what_ends_an_answer_is_a_token_of_its_own_or_a_text(bpe_tokenizer):
    encoder, eos_id = TextEncoder(bpe_tokenizer), bpe_tokenizer.eos_token_id
    assert encoder.endings([]) == {"end_token_ids": [eos_id], "stop_texts": []}
    closings = ["<|bos|>", "[end]", "\n\n", "", "e"]
    assert encoder.endings(closings) == {
        "end_token_ids": sorted([bpe_tokenizer.bos_token_id, eos_id]),
        "stop_texts": ["[end]", "e"],
    }


def test_ends_are_united():
    assert end_token_ids(None, 7, [3, 7], ()) == [3, 7]
    assert end_token_ids(None) == []


def test_half_a_character_is_no_text():
    check_text("\U0001f600 \u00e9", "x")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: is not valid UTF-8 \(U\+D83D at character 2\)"):
        check_text("a\ud83d", "rows.jsonl:3")
