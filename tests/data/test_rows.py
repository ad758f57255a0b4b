"""Rows to examples: exact boundaries, what is trained, and the policies for rows that are too long."""

from __future__ import annotations

import pytest

from ssmlora_dist.batches import IGNORED_LABEL
from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.rows import Row, RowEncoder, Segment
from ssmlora_dist.errors import DataError
from ssmlora_dist.tokenization import TextEncoder


def encode_row(tokenizer, row, max_length=1000, too_long="drop"):
    """The examples of one row and what was counted."""
    encoder = RowEncoder(TextEncoder(tokenizer), max_length, too_long)
    examples = encoder.encode(row)
    return examples, encoder.take_report(1, len(examples))


def prompt_and_answer(prompt="aaaa", answer="bb"):
    return Row("rows.jsonl:1", (Segment(prompt), Segment(answer, is_target=True)))


def document_row(before="[", document="dddddd", after="]q", answer=" b"):
    segments = (
        Segment(before),
        Segment(document, may_shrink=True),
        Segment(after),
        Segment(answer, is_target=True),
    )
    return Row("rows.jsonl:1", segments)


def test_prompt_and_answer(byte_tokenizer):
    (example,), report = encode_row(byte_tokenizer, prompt_and_answer())
    answer_ids = byte_tokenizer("bb")["input_ids"]
    assert example.input_ids.tolist() == [
        *byte_tokenizer("aaaa")["input_ids"],
        *answer_ids,
        byte_tokenizer.eos_token_id,
    ]
    assert example.labels.tolist() == [IGNORED_LABEL] * 4 + [*answer_ids, byte_tokenizer.eos_token_id]
    assert example.num_scored == 2
    assert example.metadata == {"length": 8}
    assert report == DatasetReport(1, 1)


def test_no_token_spans_the_boundary(bpe_tokenizer):
    """`st` + `ring` is one token's worth of text that the tokenizer would merge across the boundary."""
    (example,), _ = encode_row(bpe_tokenizer, prompt_and_answer("the st", "ring"))
    prompt_ids = bpe_tokenizer("the st")["input_ids"]
    answer_ids = bpe_tokenizer("ring", add_special_tokens=False)["input_ids"]
    assert bpe_tokenizer("the string")["input_ids"] != prompt_ids + answer_ids
    assert prompt_ids[0] == bpe_tokenizer.bos_token_id
    assert example.input_ids.tolist() == [*prompt_ids, *answer_ids, bpe_tokenizer.eos_token_id]
    assert example.num_targets == len(answer_ids) + 1
    assert example.num_scored == len(answer_ids)


def test_a_document_that_fits_is_encoded_with_its_prompt(bpe_tokenizer):
    """The document ends within a word that goes on, which must be encoded as it is at generation."""
    row = document_row("In ", "the st", "ring is", " here")
    (example,), _ = encode_row(bpe_tokenizer, row)
    prompt_ids = bpe_tokenizer("In the string is")["input_ids"]
    pieces = [
        bpe_tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("In ", "the st", "ring is")
    ]
    assert prompt_ids[1:] != [token for piece in pieces for token in piece]
    assert example.input_ids.tolist()[: len(prompt_ids)] == prompt_ids


def test_text_after_a_prompt_of_a_sentencepiece_tokenizer(sentencepiece_tokenizer):
    (example,), _ = encode_row(sentencepiece_tokenizer, prompt_and_answer("Answer:", " yes"))
    text = sentencepiece_tokenizer.decode(example.input_ids[:-1])
    assert text == " Answer: yes"


def test_text_is_trained_from_its_second_token(byte_tokenizer, bpe_tokenizer):
    row = Row("rows.jsonl:1", (Segment("the set", is_target=True),))
    (example,), _ = encode_row(byte_tokenizer, row)
    assert example.labels.tolist() == [IGNORED_LABEL, *example.input_ids[1:].tolist()]
    assert example.num_targets == 7
    assert example.num_scored is None
    (example,), _ = encode_row(bpe_tokenizer, row)
    assert example.input_ids[0] == bpe_tokenizer.bos_token_id
    assert example.labels.tolist() == [IGNORED_LABEL, *example.input_ids[1:].tolist()]


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_rows_without_target(byte_tokenizer, answer):
    examples, report = encode_row(byte_tokenizer, prompt_and_answer(answer=answer))
    assert examples == []
    assert report == DatasetReport(1, 0, num_without_target=1)


@pytest.mark.parametrize("too_long", ["drop", "truncate", "refuse"])
def test_a_row_of_the_longest_length_stays(byte_tokenizer, too_long):
    for row in (prompt_and_answer(), document_row(document="a", before="", after="")):
        num_tokens = sum(len(segment.text) for segment in row.segments) + 1
        (example,), report = encode_row(byte_tokenizer, row, num_tokens, too_long)
        assert example.num_tokens == num_tokens
        assert report == DatasetReport(1, 1)


def test_drop(byte_tokenizer):
    examples, report = encode_row(byte_tokenizer, prompt_and_answer(), max_length=6)
    assert examples == []
    assert report == DatasetReport(1, 0, num_dropped_too_long=1)


def test_refuse(byte_tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 7 tokens are more than max_length 6.*too_long"):
        encode_row(byte_tokenizer, prompt_and_answer(), max_length=6, too_long="refuse")


@pytest.mark.parametrize(
    ("row", "max_length", "expected"),
    [
        (prompt_and_answer("abcdef", "xy"), 8, "abcefxy"),
        (prompt_and_answer("abcdef", "xy"), 4, "axy"),
        (prompt_and_answer("ab", "uvwxyz"), 8, "auvwxyz"),
        (document_row(document="abcdef"), 10, "[abef]q b"),
        (document_row(document="abcdef"), 9, "[abf]q b"),
        (document_row(document="abcdef"), 7, "[a]q b"),
    ],
)
def test_truncate_takes_the_middle(byte_tokenizer, row, max_length, expected):
    (example,), report = encode_row(byte_tokenizer, row, max_length, "truncate")
    assert byte_tokenizer.decode(example.input_ids[:-1]) == expected
    assert example.input_ids[-1] == byte_tokenizer.eos_token_id
    assert example.num_tokens == max_length
    assert example.num_scored == len(row.segments[-1].text)
    assert report == DatasetReport(1, 1, num_truncated=1)


@pytest.mark.parametrize(
    ("row", "max_length"), [(prompt_and_answer("abcdef", "xy"), 3), (document_row(document="abcdef"), 6)]
)
def test_truncate_never_takes_question_or_answer(byte_tokenizer, row, max_length):
    examples, report = encode_row(byte_tokenizer, row, max_length, "truncate")
    assert examples == []
    assert report == DatasetReport(1, 0, num_answers_too_long=1)


def talk(*turns):
    """Context and answers in turn, as of a conversation."""
    segments = tuple(Segment(text, is_target=bool(index % 2)) for index, text in enumerate(turns))
    return Row("rows.jsonl:1", segments, is_framed=False)


@pytest.mark.parametrize(
    ("max_length", "kept", "trained"),
    [
        (16, "abcdWXYZefghPQRS", "WXYZPQRS"),
        # Of an answer that is cut nothing is trained.
        (15, "abcdWXZefghPQRS", "PQRS"),
        (12, "abcdefghPQRS", "PQRS"),
        (9, "abcghPQRS", "PQRS"),
        (5, "aPQRS", "PQRS"),
        (4, None, None),
    ],
)
def test_truncate_keeps_the_last_answer_of_a_conversation(byte_tokenizer, max_length, kept, trained):
    row = talk("abcd", "WXYZ", "efgh", "PQRS")
    examples, report = encode_row(byte_tokenizer, row, max_length, "truncate")
    if kept is None:
        assert (examples, report) == ([], DatasetReport(1, 0, num_answers_too_long=1))
        return
    (example,) = examples
    assert byte_tokenizer.decode(example.input_ids) == kept
    assert byte_tokenizer.decode(example.labels[example.labels != IGNORED_LABEL]) == trained
    assert report == DatasetReport(1, 1, num_truncated=int(max_length < 16))


@pytest.mark.parametrize("too_long", ["drop", "truncate", "refuse"])
def test_a_document_is_split(byte_tokenizer, bpe_tokenizer, too_long):
    text = "The set of all the strings. " * 20
    row = Row("book.txt", (Segment(text, is_target=True),), may_split=True)
    for tokenizer in (byte_tokenizer, bpe_tokenizer):
        num_bos = len(TextEncoder(tokenizer).bos_ids)
        examples, report = encode_row(tokenizer, row, 64, too_long)
        assert [example.num_tokens for example in examples[:-1]] == [64] * (len(examples) - 1)
        assert all(example.labels[1:].tolist() == example.input_ids[1:].tolist() for example in examples)
        body = [token for example in examples for token in example.input_ids[num_bos:].tolist()]
        assert body == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        num = len(examples)
        assert report == DatasetReport(1, num, num_split=1, num_pieces=num)


def test_a_last_piece_of_one_token_takes_another_along(byte_tokenizer):
    """Alone it would have no target where sequences begin without a token."""
    row = Row("book.txt", (Segment("a" * 15 + "b", is_target=True),), may_split=True)
    examples, report = encode_row(byte_tokenizer, row, 8)
    assert [byte_tokenizer.decode(example.input_ids) for example in examples] == [
        "a" * 8,
        "a" * 7,
        "b<|eos|>",
    ]
    assert report == DatasetReport(1, 3, num_split=1, num_pieces=3)


@pytest.mark.parametrize(("num_tokens", "bucket"), [(3, 4), (63, 64), (64, 64), (65, 128)])
def test_length_buckets_are_powers_of_two(byte_tokenizer, num_tokens, bucket):
    (example,), _ = encode_row(byte_tokenizer, prompt_and_answer("a" * (num_tokens - 2), "b"))
    assert example.num_tokens == num_tokens
    assert example.metadata["length"] == bucket


@pytest.mark.parametrize("is_long", [False, True])
def test_beginning_and_end_that_a_text_spells_are_there_once(bpe_tokenizer, is_long):
    bos, eos = bpe_tokenizer.bos_token, bpe_tokenizer.eos_token
    plain = prompt_and_answer("the set", " of it")
    text = "the set of it " * 9
    for end in (eos, f"{eos}\n"):
        spelled = prompt_and_answer(f"{bos}the set", f" of it{end}")
        (example,), (wanted,) = encode_row(bpe_tokenizer, spelled)[0], encode_row(bpe_tokenizer, plain)[0]
        assert example.input_ids.tolist() == wanted.input_ids.tolist()
        assert example.labels.tolist() == wanted.labels.tolist()
        assert example.num_scored == wanted.num_scored
        rows = [
            Row("x", (Segment(words, is_target=True),), may_split=is_long)
            for words in (f"{bos}{text}{end}", text)
        ]
        pieces, wanted_pieces = (encode_row(bpe_tokenizer, row, 16 if is_long else 999)[0] for row in rows)
        assert [e.input_ids.tolist() for e in pieces] == [e.input_ids.tolist() for e in wanted_pieces]


def test_special_tokens_within_a_text_stay(bpe_tokenizer):
    bos_id, eos_id = bpe_tokenizer.bos_token_id, bpe_tokenizer.eos_token_id
    (example,), _ = encode_row(bpe_tokenizer, prompt_and_answer("a<|eos|>", "<|bos|>b"))
    assert example.input_ids.tolist().count(eos_id) == 2
    assert example.input_ids.tolist().count(bos_id) == 2


def test_half_a_character_is_refused(bpe_tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: is not valid UTF-8 \(U\+D800 at character 1\)"):
        encode_row(bpe_tokenizer, prompt_and_answer("\ud800"))
