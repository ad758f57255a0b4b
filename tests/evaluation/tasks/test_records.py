"""Items out of records: prompts, choices, labels of every kind, and records that do not fit."""

from __future__ import annotations

import pytest

from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import ChoiceItem, FailedItem, GenerationItem
from ssmlora_dist.evaluation.tasks.records import ChoiceFormat, GenerationFormat, items_of_records
from ssmlora_dist.records import Record, UnusedFields

PLACE = "rows.jsonl:3"


def record(**values) -> Record:
    return Record(values, PLACE)


def choose(format=None, **values) -> ChoiceItem:
    return (format or ChoiceFormat("{q}"))(record(q="Q:", **values), "0")


def test_listed_choices_follow_a_space():
    item = choose(ChoiceFormat(), question="why", choices=["so", 4, True], label=1)
    assert item == ChoiceItem("0", "Question: why\nAnswer:", (" so", " 4", " true"), 1)


def test_templates_and_mapped_fields():
    format = ChoiceFormat(
        "{article} {ask}", [" yes, {who}", " no"], fields={"ask": "question.text", "label": "gold"}
    )
    item = choose(format, article="A.", question={"text": "really?"}, who="Ann", gold=0)
    assert item == ChoiceItem("0", "A. really?", (" yes, Ann", " no"), 0)


def test_choices_in_a_nested_list():
    format = ChoiceFormat("{q}", fields={"choices": "options.text"})
    assert choose(format, options=[{"text": "a"}, {"text": "b"}], label=1).choices == (" a", " b")


def test_spaces_at_the_end_of_a_prompt_go_to_the_choices():
    assert choose(ChoiceFormat("{q}  ", ["a", "b"]), label=0) == ChoiceItem("0", "Q:", ("  a", "  b"), 0)
    assert choose(ChoiceFormat("{q}\n", [" a", " b"]), label=0).prompt == "Q:\n"
    item = GenerationFormat("{q} ", max_new_tokens=4)(record(q="Q:", references="a"), "0")
    assert item.prompt == "Q:"


@pytest.mark.parametrize(
    ("prompt", "choices"), [("Q: {q}\nA:", None), ("{q} ", [" {a}", "{b}!"]), ("{q}  ", None)]
)
def test_asked_as_trained(prompt, choices):
    """The training format's context and answer are the item's prompt and right choice."""
    rec = record(q="why?", a="so", b="no", choices=["x", "y"], label=1)
    (row,) = make_renderer("multiple_choice", None, prompt=prompt, choices=choices)(rec)
    item = ChoiceFormat(prompt, choices)(rec, "0")
    assert [segment.text for segment in row.segments] == [item.prompt, item.choices[item.label]]


@pytest.mark.parametrize(
    ("choices", "label", "message"),
    [
        (["no", "yes"], "true", r"holds 'true', which is none of its 2 choices; .*true or false, the text"),
        (["no", "yes"], "1", r"holds '1', .* allowed: a whole number from 0 to 1, a letter from A to B"),
        (
            ["x", "y", "z"],
            "D",
            r"a letter from A to C, the text of a choice; mend .*`fields.label`.*`labels`",
        ),
        (["x", "y", "z"], 3, r"holds 3, .* a whole number from 0 to 2"),
        (["x", "y"], -1, r"holds -1, .*-1 stands for a label that is kept secret: take another split"),
        (["x", "y", "z"], True, r"holds true, which is none of its 3 choices"),
        (["x", "y"], 1.0, r"holds 1\.0"),
        (["x", "y"], [1], r"holds \[1\]"),
        (["x", "x"], "x", r"holds 'x', which may mean several of its 2 choices"),
        # The first choice by its letter, the second by its text.
        (
            ["b", "a"],
            "a",
            r"may mean several of its 2 choices; position 0, 'b', by its letter; position 1, 'a', by its "
            r"text; mend .*`labels`",
        ),
        (
            ["1", "2", "3"],
            2,
            r"may mean .*; position 2, '3', by its number; position 1, '2', by its text",
        ),
        (["x", "y"], "", r"holds ''"),
        (["x", "y"], None, r"is null"),
    ],
)
def test_labels_that_name_no_choice(choices, label, message):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:3: field 'label' .*{message}"):
        choose(choices=choices, label=label)


def test_labels_by_mapping():
    format = ChoiceFormat(
        "{q}", [" no", " yes"], {"label": "gold"}, {"true": 1, "false": 0, "1": 0, "0.5": 1}
    )
    assert [choose(format, gold=value).label for value in ("true", True, False, 1, "1", 0.5)] == [
        1,
        1,
        0,
        0,
        0,
        1,
    ]
    with pytest.raises(
        DataError, match=r"field 'gold' holds 0, .* allowed: one of `labels`: 'true', 'false', '1'"
    ):
        choose(format, gold=0)
    with pytest.raises(DataError, match=r"field 'label' holds a list where text is needed"):
        choose(format, gold=["x"])
    with pytest.raises(
        DataError, match=r"holds 'c', .* 2 choices; `labels` makes it position 2; allowed: from 0"
    ):
        choose(ChoiceFormat("{q}", labels={"c": 2}), choices=["x", "y"], label="c")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"choices": ["x", ""], "label": 0}, r"choice 2 of 2 is empty"),
        ({"choices": [" ", "x"], "label": 1}, r"choice 1 of 2 is empty"),
        ({"choices": ["x"], "label": 0}, r"field 'choices' must be a list of at least two answers"),
        ({"choices": [], "label": 0}, r"field 'choices' must be a list of at least two answers"),
        ({"choices": "xy", "label": 0}, r"field 'choices' must be a list of at least two answers"),
        ({"choices": ["x", None], "label": 0}, r"field 'choices' holds null where text is needed"),
        ({"label": 0}, r"the record has no field 'choices'"),
        ({"choices": ["x", "y"]}, r"the record has no field 'label'"),
        ({"choices": ["x", "y"], "lable": 0}, r"the record has no field 'label' \(nearest: lable\)"),
    ],
)
def test_records_without_proper_choices(values, message):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:3: {message}"):
        choose(**values)


def test_templates_that_come_out_empty():
    with pytest.raises(DataError, match=r"choice 1 of 2 is empty"):
        choose(ChoiceFormat("{q}", [" {a}", " {b}"]), a="", b="x", label=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{q"}, r"^prompt: .* is no template"),
        ({"choices": ["{a}", "{b"]}, r"^choices\[1\]: .* is no template"),
        ({"choices": ["{a}"]}, r"^choices: 1 template given; needed: at least 2"),
        ({"choices": ["{a}", "{b}"], "labels": {"x": 2}}, r"^labels.x: 2 given; .* from 0 to 1"),
        ({"labels": {"x": -1}}, r"^labels.x: -1 given; .* 0 or more"),
        ({"fields": {"lable": "gold"}}, r"^fields.lable: .*\(nearest: label\); used are: choices, label, q$"),
        ({"choices": ["{a}", "{b}"], "fields": {"choices": "x"}}, r"^fields.choices: neither"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(DataError, match=message):
        ChoiceFormat(**{"prompt": "{q}", **settings})


def test_generation():
    format = GenerationFormat(
        "{text}\nQ: {q}\nA:", max_new_tokens=9, stop=("\n\n",), fields={"references": "answers.text"}
    )
    item = format(record(text="T", q="why", answers=[{"text": "so"}, {"text": 4}]), "5")
    assert item == GenerationItem("5", "T\nQ: why\nA:", ("so", "4"), 9, ("\n\n",))
    plain = GenerationFormat(max_new_tokens=1)(record(question="why", references="so"), "0")
    assert plain == GenerationItem("0", "Question: why\nAnswer:", ("so",), 1, ("\n",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"references": []}, r"field 'references' is an empty list"),
        ({"references": ["x", " "]}, r"an answer is empty"),
        ({"references": {"a": "b"}}, r"field 'references' holds an object where text is needed"),
        ({}, r"the record has no field 'references'"),
    ],
)
def test_records_without_references(values, message):
    with pytest.raises(DataError, match=rf"^rows\.jsonl:3: {message}"):
        GenerationFormat("{q}", max_new_tokens=4)(record(q="Q:", **values), "0")
    with pytest.raises(DataError, match=r"^fields.answer: neither"):
        GenerationFormat("{q}", max_new_tokens=4, fields={"answer": "x"})


def rows(*labels) -> list[Record]:
    return [
        Record({"q": "Q:", "choices": ["x", "y"], "label": label}, f"rows.jsonl:{number}")
        for number, label in enumerate(labels, start=1)
    ]


def test_bad_records_fail_alone():
    items = list(items_of_records(rows("true", 0, "maybe", 1), ChoiceFormat("{q}"), "mine"))
    assert [type(item) for item in items] == [FailedItem, ChoiceItem, FailedItem, ChoiceItem]
    assert [item.id for item in items] == ["0", "1", "2", "3"]
    assert items[0].error.startswith("rows.jsonl:1: field 'label' holds 'true'")
    assert items[2].error.startswith("rows.jsonl:3: field 'label' holds 'maybe'")


def test_fields_that_nobody_reads_are_counted():
    unused = UnusedFields()
    hints = zip(rows(0, "?", 1), ("a", "b", ""), strict=True)
    records = [Record({**row.values, "id": 7, "hint": hint}, row.where) for row, hint in hints]
    list(items_of_records(records, ChoiceFormat("{q}"), "mine", unused=unused))
    assert unused.text() == "fields not used: id, hint (in 1 of 2 records)"


def test_limit_counts_items_and_reads_no_further():
    def records():
        yield from rows(0, "true", 1)
        raise AssertionError("read too far")

    assert [item.id for item in items_of_records(records(), ChoiceFormat("{q}"), "mine", limit=3)] == [
        "0",
        "1",
        "2",
    ]


def test_no_usable_record_is_one_error_and_nothing_before():
    items = items_of_records(rows(0, 1, 0), ChoiceFormat("{question}"), "mine")
    with pytest.raises(
        DataError,
        match=r"^records of the task 'mine': none of 3 can be used; the first: rows.jsonl:1: .*'question'",
    ):
        next(items)
    with pytest.raises(DataError, match=r"^records of the task 'mine': there are none"):
        next(items_of_records([], ChoiceFormat("{q}"), "mine"))


def test_records_of_several_items():
    def prepare(record):
        if record.values["q"] == "bad":
            raise DataError(f"{record.where}: bad")
        for text in record.values["q"].split():
            yield Record({**record.values, "q": text}, f"{record.where}, part {text}")

    records = [
        record(q="a b", choices=["x", "y"], label=0),
        record(q="bad"),
        record(q="c", choices=["x"], label=0),
    ]
    items = list(items_of_records(records, ChoiceFormat("{q}"), "mine", prepare))
    assert [item.id for item in items] == ["0-0", "0-1", "1", "2"]
    assert items[2] == FailedItem("1", "rows.jsonl:3: bad")
    assert items[3].error.startswith("rows.jsonl:3, part c: field 'choices'")
