"""Paths into records and templates over them."""

from __future__ import annotations

import datetime

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.records import MISSING, Record, RecordView, Template, resolve_path

VALUES = {
    "question": "why",
    "target": {"span": "it", "at": 3},
    "a.b": "dotted",
    "queries": [{"q": "one", "by": {"name": "x"}}, {"q": "two", "by": {"name": "y"}}],
    "nothing": None,
    "flag": True,
    "share": 0.5,
    "day": datetime.date(2025, 2, 4),
}


def view(**fields) -> RecordView:
    return RecordView(Record(VALUES, "rows.jsonl:7"), fields)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("question", "why"),
        ("target.span", "it"),
        ("a.b", "dotted"),
        ("queries.q", ["one", "two"]),
        ("queries.by.name", ["x", "y"]),
        ("target.span.more", MISSING),
        ("queries.r", MISSING),
        ("target.", MISSING),
    ],
)
def test_paths(path, expected):
    assert resolve_path(VALUES, path) == expected


def test_several_paths_join_lists():
    assert view(question=["queries.q", "queries.by.name"]).value("question") == ["one", "two", "x", "y"]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: field 'question' is no list"):
        view(question=["queries.q", "question"]).value("question")


def test_scalars_as_text():
    template = Template("{question} {flag} {share} {target.at} {{kept}}", "prompt")
    assert template.names == ["question", "flag", "share", "target.at"]
    assert template.render(view()) == "why true 0.5 3 {kept}"


def test_mapped_names_reach_templates():
    assert Template("{question}|{span}", "prompt").render(view(span="target.span")) == "why|it"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "quesion",
            {},
            r"rows\.jsonl:7: the record has no field 'quesion' \(nearest: question\).*it has: question, t",
        ),
        ("asked", {"asked": "quesion"}, r"no field 'quesion' for 'asked' \(nearest: question\)"),
        ("nothing", {}, r"rows\.jsonl:7: field 'nothing' is null"),
        ("queries", {}, r"field 'queries' holds a list where text is needed"),
        ("target", {}, r"field 'target' holds an object where text is needed"),
        ("day", {}, r"field 'day' holds a date where text is needed; write it as text or a number"),
    ],
)
def test_fields_that_are_no_text(name, fields, message):
    with pytest.raises(DataError, match=message):
        view(**fields).text(name)


@pytest.mark.parametrize("text", ["{question", "question}", "{}", "{question!r}", "{question:>5}"])
def test_malformed_templates(text):
    with pytest.raises(DataError, match=r"^prompt: .* is no template"):
        Template(text, "prompt")
