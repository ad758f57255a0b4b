"""Labels as people write them: training and evaluation take each for the same choice, or refuse it alike."""

from __future__ import annotations

import pytest

from ssmlora_dist.batches import IGNORED_LABEL
from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.data.rows import RowEncoder
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.encoding import PromptEncoder
from ssmlora_dist.evaluation.tasks.records import ChoiceFormat
from ssmlora_dist.models import load_tokenizer
from ssmlora_dist.records import Record
from ssmlora_dist.tokenization import TextEncoder

REFUSED = None
NO_YES, YES_NO = ["no", "yes"], ["yes", "no"]
WORDS, COUNTED = ["red", "green", "blue"], ["1", "2", "3"]
LETTERED = ["B. green", "A. red", "C. blue"]
NUMBERED = ["1. red", "2. green", "3. blue"]

# Choices, label, and the choice that is meant.
SPELLINGS = [
    (WORDS, 0, "red"),
    (WORDS, 2, "blue"),
    (WORDS, 3, REFUSED),
    (WORDS, -1, REFUSED),
    (WORDS, "-1", REFUSED),
    (WORDS, "green", "green"),
    (WORDS, " green\n", "green"),
    (WORDS, "Green", REFUSED),
    (WORDS, "B", "green"),
    (WORDS, "b", "green"),
    (WORDS, "(B)", "green"),
    (WORDS, "B.", "green"),
    (WORDS, "b)", "green"),
    (WORDS, "D", REFUSED),
    (WORDS, "1", REFUSED),
    (WORDS, 1.0, REFUSED),
    (WORDS, True, REFUSED),
    (WORDS, "true", REFUSED),
    (WORDS, "", REFUSED),
    (WORDS, None, REFUSED),
    (WORDS, [1], REFUSED),
    (WORDS, {"text": "red"}, REFUSED),
    (["red", " green "], "green", "green"),
    (["red", "red"], "red", REFUSED),
    (["red", "red"], 1, "red"),
    (["b", "a"], "a", REFUSED),
    (["b", "a"], "A", "b"),
    (["A", "B"], "B", "B"),
    (["n", "y"], "y", "y"),
    # Booleans.
    (YES_NO, True, "yes"),
    (YES_NO, False, "no"),
    (NO_YES, True, "yes"),
    (NO_YES, False, "no"),
    (["True", "False"], True, "True"),
    (["True", "False"], False, "False"),
    (["FALSE", "TRUE"], True, "TRUE"),
    (["Incorrect", "Correct"], True, "Correct"),
    (["right", "wrong"], False, "wrong"),
    (["Yes.", "No."], True, "Yes."),
    (["yes", "no", "maybe"], True, "yes"),
    (["yes", "no", "maybe"], False, "no"),
    (["maybe", "yes"], True, "yes"),
    (["yes", "maybe"], False, REFUSED),
    (["yes", "true"], True, REFUSED),
    (["Yes, it rained.", "No, it was dry."], True, REFUSED),
    (["1", "0"], True, REFUSED),
    ([1, 0], True, REFUSED),
    (["y", "n"], True, REFUSED),
    (["entailed", "not entailed"], True, REFUSED),
    (["not entailed", "entailed"], True, REFUSED),
    (["cold", "warm"], True, REFUSED),
    (["ja", "nein"], True, REFUSED),
    (["sí", "no"], False, "no"),
    (["agree", "disagree"], True, REFUSED),
    (YES_NO, "yes", "yes"),
    (YES_NO, "true", REFUSED),
    (["True", "False"], "True", "True"),
    (["True", "False"], "true", REFUSED),
    ([True, False], True, "true"),
    ([False, True], "true", "true"),
    # Numbers that are texts.
    (COUNTED, "2", "2"),
    (COUNTED, " 2", "2"),
    (COUNTED, 2, REFUSED),
    (COUNTED, 0, "1"),
    (["0", "1", "2"], 1, "1"),
    ([0, 1, 2], 2, "2"),
    ([10, 20], 20, "20"),
    ([0.5, 1.5], 1.5, "1.5"),
    (["1", "2"], 1, REFUSED),
    (["1.0", "2.0"], 1, REFUSED),
    (["1.0", "2.0"], 2, "2.0"),
    (["+1", "-1"], 1, REFUSED),
    (["+1", "-1"], -1, "-1"),
    (["01", "02"], 1, REFUSED),
    # Marks in the choices.
    (LETTERED, "A", REFUSED),
    (LETTERED, "C", "C. blue"),
    (LETTERED, "A. red", "A. red"),
    (["(A) red", "(B) green"], "B", "(B) green"),
    (NUMBERED, "2", "2. green"),
    (NUMBERED, 2, REFUSED),
    (NUMBERED, 3, "3. blue"),
    (["A. Smith", "D. Jones"], "D", REFUSED),
    (["[B] red", "[A] blue"], "A", REFUSED),
    (["B - red", "A - blue"], "B", REFUSED),
    (["Option B", "Option A"], "A", REFUSED),
    (["Option 1", "Option 2"], 1, REFUSED),
    (["Option 1", "Option 2"], 0, "Option 1"),
    (["1 star", "2 stars", "3 stars"], 1, REFUSED),
    (["1 star", "2 stars", "3 stars"], 3, "3 stars"),
    (["1 star", "2 stars", "3 stars"], "2", "2 stars"),
    (["4 apples", "1 pear"], 1, "1 pear"),
]


def outcome(read) -> tuple[str, str]:
    """What was chosen, or what was said."""
    try:
        return "chosen", read()
    except DataError as error:
        return "refused", str(error)


def trained(record: Record, settings: dict) -> str:
    (row,) = make_renderer("multiple_choice", None, **settings)(record)
    assert [segment.is_target for segment in row.segments] == [False, True]
    return row.segments[1].text


def asked(record: Record, settings: dict) -> str:
    item = ChoiceFormat(**settings)(record, "0")
    return item.choices[item.label]


def both(choices, label, settings) -> tuple[str, str]:
    listed = {} if "choices" in settings else {"choices": choices}
    record = Record({"question": "Which?", **listed, "label": label}, "rows.jsonl:3")
    in_training, in_evaluation = (
        outcome(lambda read=read: read(record, settings)) for read in (trained, asked)
    )
    assert in_training == in_evaluation
    return in_training


@pytest.mark.parametrize(("choices", "label", "expected"), SPELLINGS)
def test_training_and_evaluation_agree(choices, label, expected):
    settings = [{}]
    if all(isinstance(choice, str) for choice in choices):
        settings.append({"choices": tuple(f" {choice}" for choice in choices)})
    for setting in settings:
        kind, text = both(choices, label, setting)
        if expected is REFUSED:
            assert kind == "refused"
            assert text.startswith("rows.jsonl:3: field 'label' ")
        else:
            assert (kind, text.strip()) == ("chosen", expected)


def test_labels_decide_alone():
    settings = {"labels": {"1": 0, "2": 1, "true": 2, "-1": 1}}
    for label, expected in [(1, "1"), ("2", "2"), (" 2 ", "2"), (True, "3"), (-1, "2")]:
        assert both(COUNTED, label, settings) == ("chosen", f" {expected}")
    kind, text = both(COUNTED, "3", settings)
    assert kind == "refused"
    assert "allowed: one of `labels`: '1', '2', 'true', '-1'" in text


def test_a_position_of_labels_that_a_record_has_not_is_named():
    kind, text = both(["red", "blue"], True, {"labels": {"true": 5}})
    assert kind == "refused"
    assert (
        "holds true, which is none of its 2 choices; `labels` makes it position 5; allowed: from 0 to 1;"
        in text
    )


@pytest.mark.parametrize("bos_token", [None, "<|bos|>"])
def test_an_empty_prompt_is_the_same_token(bos_token):
    tokenizer = load_tokenizer("bytes")
    tokenizer.bos_token = bos_token
    record = Record({"question": "", "choices": ["x", "y"], "label": 1}, "rows.jsonl:1")
    (row,) = make_renderer("multiple_choice", tokenizer, prompt="{question}")(record)
    (example,) = RowEncoder(TextEncoder(tokenizer), 16, "drop").encode(row)
    item = ChoiceFormat("{question}")(record, "0")
    asked = PromptEncoder(tokenizer, 16, len(tokenizer)).choices(item.prompt, item.choices)
    ids = [*asked.prompt, *asked.choices[1], tokenizer.eos_token_id]
    assert example.input_ids.tolist() == ids
    assert example.labels.tolist() == [IGNORED_LABEL, *ids[1:]]
