"""bAbI's files, their errors, and their facts in a text."""

from __future__ import annotations

import re

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.tasks.babilong import BabiQuestion, babilong, read_babi

from .generated import num_tokens, write_stories

MOVE = re.compile(r"(Mary|John|Daniel) went to the (\w+)\.")


def write(tmp_path, text):
    path = tmp_path / "qa.txt"
    path.write_text(text)
    return path


def make(tokenizer, path, lengths, num_examples, **changes):
    settings = {"task": "qa1", "split": "test", "seed": 0} | changes
    return babilong(tokenizer, path=path, lengths=lengths, num_examples=num_examples, **settings)


def test_every_question_has_the_facts_told_before_it(tmp_path):
    path = write(
        tmp_path,
        "1 Mary got the milk.\n2 Where is the milk? \tkitchen\t1\n"
        "3 Mary left.\n4 How many? \tapple,milk\t1 3\n"
        "1 John is either in the park or at home.\n2 Is John at home? \tmaybe\t1\n",
    )
    milk, left = "Mary got the milk.", "Mary left."
    assert read_babi(path) == [
        BabiQuestion(f"{path}:2", (milk,), "Where is the milk?", "kitchen"),
        BabiQuestion(f"{path}:4", (milk, left), "How many?", "apple,milk"),
        BabiQuestion(f"{path}:6", ("John is either in the park or at home.",), "Is John at home?", "maybe"),
    ]


def test_bars_in_place_of_tabs(tmp_path):
    path = write(tmp_path, "1 Mary got the milk.\n2 Where is the milk? |kitchen|1\n")
    assert [question.answer for question in read_babi(path)] == ["kitchen"]


def test_questions_may_follow_each_other_and_support_may_be_named_twice(tmp_path):
    path = write(tmp_path, "1 Yann is bored.\n2 Why?\tbored\t1 1\n3 Where?\tgarden\t1\n")
    assert [question.answer for question in read_babi(str(path))] == ["bored", "garden"]


@pytest.mark.parametrize(
    ("text", "row", "message"),
    [
        ("Mary moved.\n", 1, "'Mary moved.' is out of form; a line is `NUMBER FACT`"),
        ("1 Mary moved.\n3 John moved.\n", 2, "line 3 of a story comes after its line 1"),
        ("2 Mary moved.\n", 1, "line 2 of a story comes after its line 0"),
        ("1 A.\n\n2 Where? \t\t1\n", 3, "a question must have its text, a tab and its answer"),
        ("1 A.\n2 \tgarden\t1\n", 2, "a question must have its text"),
        ("1 A.\n2 Where? \tgarden\tone\n", 2, "'one' is not the number of a fact told before"),
        ("1 A.\n2 Where? \tgarden\t3\n", 2, "'3' is not the number of a fact told before"),
        ("1 Where? \tgarden\n", 1, "a question before any fact"),
    ],
)
def test_malformed_lines_are_named(tmp_path, text, row, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError) as error:
        read_babi(path)
    assert str(error.value).startswith(f"{path}:{row}: ")
    assert message in str(error.value)


def test_files_without_questions_are_named(tmp_path):
    for text in ("", "1 Mary moved.\n"):
        with pytest.raises(DataError, match=r"qa\.txt: no question in it"):
            read_babi(write(tmp_path, text))
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        read_babi(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe1 A")
    with pytest.raises(DataError, match=r"bytes\.txt: cannot be read"):
        read_babi(tmp_path / "bytes.txt")


@pytest.mark.parametrize("length", [256, 512, 1024, 2048])
def test_a_thousand_samples(tmp_path, length, word_tokenizer):
    """Exact lengths; the facts in their order give the answer."""
    path = write_stories(tmp_path / "qa1.txt", 200)
    questions = read_babi(path)
    for item, question in zip(make(word_tokenizer, path, [length], 1000), questions, strict=True):
        total = num_tokens(word_tokenizer, item.prompt) + item.max_new_tokens
        assert 0.99 * length <= total <= length
        moves = MOVE.findall(item.prompt)
        assert [f"{name} went to the {room}." for name, room in moves] == list(question.facts)
        asked = re.search(r"Where is (\w+)\?\nAnswer:$", item.prompt)[1]
        assert item.references == (dict(moves)[asked],) == (question.answer,)
        assert item.metadata["question"] == question.question
        assert (item.max_new_tokens, item.stop) == (15, ("\n",))


@pytest.mark.parametrize("tokenizer_name", ["byte_tokenizer", "bpe_tokenizer", "sentencepiece_tokenizer"])
def test_lengths_hold_in_tokens_that_merge(tmp_path, tokenizer_name, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    for item in make(tokenizer, write_stories(tmp_path / "qa1.txt", 4), [2000], 10):
        assert 0.99 * 2000 <= num_tokens(tokenizer, item.prompt) + item.max_new_tokens <= 2000


def test_facts_are_spread(tmp_path, word_tokenizer):
    path = write_stories(tmp_path / "qa1.txt", 40)
    positions = [
        match.start() / len(item.prompt)
        for item in make(word_tokenizer, path, [2000], 200)
        for match in MOVE.finditer(item.prompt)
    ]
    tenths = [
        sum(k / 10 <= position < (k + 1) / 10 for position in positions) / len(positions) for k in range(10)
    ]
    # A tenth each, but for the sentence in which a fact would have fallen and for opening and question.
    assert all(0.05 < tenth < 0.15 for tenth in tenths), tenths


def test_an_item_depends_on_settings_and_its_number_alone(tmp_path, word_tokenizer):
    path = write_stories(tmp_path / "qa1.txt", 4)
    few, many = (list(make(word_tokenizer, path, [512, 1024], count)) for count in (3, 7))
    assert many[:6] == few
    assert len({item.id for item in many}) == len({item.prompt for item in many}) == 14
    assert few[0].prompt != next(make(word_tokenizer, path, [512], 1, seed=1)).prompt


def test_ranges_and_limits(tmp_path, word_tokenizer):
    path = write_stories(tmp_path / "qa1.txt", 4)
    whole = [item.metadata["question"] for item in make(word_tokenizer, path, [512], 20)]
    part = [item.metadata["question"] for item in make(word_tokenizer, path, [512], 5, first_question=7)]
    assert part == whole[7:12]
    assert {item.metadata["num_facts"] for item in make(word_tokenizer, path, [512], 8, max_facts=4)} == {
        2,
        4,
    }
    with pytest.raises(DataError, match=r"20 questions are too few for 15 from number 7 on"):
        make(word_tokenizer, path, [512], 15, first_question=7)
    with pytest.raises(DataError, match=r"8 questions with at most 4 facts are too few for 9"):
        make(word_tokenizer, path, [512], 9, max_facts=4)
    with pytest.raises(DataError, match=r"babilong_qa1: a length of 64 tokens cannot hold"):
        make(word_tokenizer, path, [64], 9)
