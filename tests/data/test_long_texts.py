"""Long texts in pieces: the same tokens as in one, and no more of a text than is needed."""

from __future__ import annotations

import itertools
import json
from pydoc_data.topics import topics

import pytest

from ssmlora_dist.data import ExampleReader
from ssmlora_dist.errors import DataError
from ssmlora_dist.long_texts import PIECE, encode_ends, encode_pieces
from ssmlora_dist.tokenization import TextEncoder

from ..examples import read_dataset

PROSE = "\n".join(text for _, text in sorted(topics.items()))[: 3 * PIECE + 999]
TOKENIZERS = ["byte_tokenizer", "bpe_tokenizer", "sentencepiece_tokenizer"]


class Counted(TextEncoder):
    """Counts the characters that the tokenizer is given."""

    num_characters = 0

    def encode(self, text):
        Counted.num_characters += len(text)
        return super().encode(text)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("follows", [False, True])
def test_pieces_are_the_tokens_of_the_whole(name, follows, request):
    encoder = TextEncoder(request.getfixturevalue(name))
    whole = encoder.encode_continuation(PROSE) if follows else encoder.encode(PROSE)
    pieces = list(encode_pieces(encoder, PROSE, follows))
    assert len(pieces) > 3
    assert list(itertools.chain(*pieces)) == whole
    assert encode_ends(encoder, PROSE, follows, len(whole)) == whole
    ends = encode_ends(encoder, PROSE, follows, 100)
    assert len(ends) < len(whole)
    assert (ends[:100], ends[-100:]) == (whole[:100], whole[-100:])


def test_texts_without_spaces_are_cut_too(bpe_tokenizer):
    encoder = TextEncoder(bpe_tokenizer)
    text = "".join(PROSE.split())[: 2 * PIECE]
    assert bpe_tokenizer.decode(list(itertools.chain(*encode_pieces(encoder, text, False)))) == text


@pytest.mark.parametrize(
    ("format", "field", "too_long", "expected"),
    [
        ("instruction", "instruction", "drop", {"num_dropped_too_long": 1}),
        ("instruction", "output", "drop", {"num_dropped_too_long": 1}),
        ("instruction", "instruction", "truncate", {"num_truncated": 1}),
        ("instruction", "output", "truncate", {"num_answers_too_long": 1}),
        ("long_document_qa", "document", "truncate", {"num_truncated": 1}),
    ],
)
def test_of_a_line_of_four_megabytes_the_ends_are_encoded(
    format, field, too_long, expected, bpe_tokenizer, write_jsonl, monkeypatch
):
    monkeypatch.setattr("ssmlora_dist.data.building.TextEncoder", Counted)
    Counted.num_characters = 0
    short = dict.fromkeys(("instruction", "output", "document", "question", "answer"), "short")
    path = write_jsonl([short, {**short, field: "a long word " * 350_000}])
    reader = ExampleReader(
        format=format,
        tokenizer=bpe_tokenizer,
        max_length=512,
        partition="train",
        path=path,
        too_long=too_long,
    )
    report = read_dataset(reader).report
    assert {name: count for name, count in report.counts().items() if count and "rows" not in name} == {
        "num_examples": 1 + expected.get("num_truncated", 0),
        **expected,
    }
    assert Counted.num_characters < 3 * PIECE


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_of_a_long_conversation_the_ends_are_encoded(place, bpe_tokenizer, write_jsonl, monkeypatch):
    for module in ("building", "formats"):
        monkeypatch.setattr(f"ssmlora_dist.data.{module}.TextEncoder", Counted)
    Counted.num_characters = 0
    contents = ["short"] * 4
    contents[place] = "a long word " * 350_000
    talk = [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 2, contents, strict=True)
    ]
    settings = {"format": "chat", "tokenizer": bpe_tokenizer, "max_length": 512, "partition": "train"}
    reader = ExampleReader(**settings, path=write_jsonl([{"messages": talk}]))
    with pytest.raises(DataError, match=r"nothing is left of 1 rows .* 1 longer than max_length"):
        read_dataset(reader)
    assert Counted.num_characters < 8 * PIECE


def test_a_long_line_that_is_refused_says_so(bpe_tokenizer, write_jsonl):
    path = write_jsonl([json.dumps({"instruction": "word " * PIECE, "output": "x"})])
    reader = ExampleReader(
        format="instruction",
        tokenizer=bpe_tokenizer,
        max_length=64,
        partition="train",
        path=path,
        too_long="refuse",
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: at least \d+ tokens are more than max_length 64"):
        read_dataset(reader)
