"""Records of one's own are read alike by training and evaluation, under the same names and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ssmlora_dist.config.schema import TaskSection
from ssmlora_dist.config.tasks import OWN, own_format
from ssmlora_dist.data.formats import FORMATS, make_renderer
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import ChoiceItem, GenerationItem
from ssmlora_dist.evaluation.tasks.records import GenerationFormat, items_of_records
from ssmlora_dist.records import Record

DOCUMENT = {"document": "Long ago.", "question": "When?", "answer": ["long ago", "once"]}
MEETING = {
    "turns": [{"who": "A", "what": "one"}, {"who": "B", "what": "two"}],
    "queries": [{"q": "Who?", "a": "A"}, {"q": "What?", "a": ["two", "2"]}],
}
QUERIES = {"document": "turns", "question": "queries.q", "answer": "queries.a"}
CASES: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "instruction": ("instruction", {"instruction": "Add.", "input": "1 1", "output": 2}, {}),
    "instruction, no input": ("instruction", {"instruction": "Add.", "input": " ", "output": "2"}, {}),
    "instruction, templates": (
        "instruction",
        {"do": "Add.", "out": {"text": "2"}},
        {
            "prompt": "{instruction} ",
            "answer": "{output}!",
            "fields": {"instruction": "do", "output": "out.text"},
        },
    ),
    "generation": ("generation", {"question": "Why?", "references": ["so", 4]}, {}),
    "generation, templates": (
        "generation",
        {"q": "Why?", "r": [{"t": "so"}, {"t": "thus"}]},
        {"prompt": "Q: {q}\nA:", "answer": " {references}.", "fields": {"references": "r.t"}},
    ),
    "document": ("long_document_qa", DOCUMENT, {}),
    "document of several questions": ("long_document_qa", MEETING, {"fields": QUERIES}),
    "choices": ("multiple_choice", {"question": "Sure?", "choices": ["no", "yes"], "label": "B"}, {}),
    "choices, templates": (
        "multiple_choice",
        {"q": "Sure?", "gold": "good"},
        {
            "prompt": "{q} ",
            "choices": ["no", "yes"],
            "labels": {"good": 1, "bad": 0},
            "fields": {"label": "gold"},
        },
    ),
}


def trained(format: str, record: Record, settings: dict[str, Any]) -> list[tuple[str, str]]:
    rows = make_renderer(format, None, **settings)(record)
    return [("".join(s.text for s in row.segments[:-1]), row.segments[-1].text) for row in rows]


def asked(format: str, record: Record, settings: dict[str, Any]) -> list[tuple[str, str]]:
    made = own_format(TaskSection(task=format, **settings))
    prepare = made.singles if isinstance(made, GenerationFormat) else None
    found = []
    for item in items_of_records([record], made, "mine", prepare):
        if isinstance(item, ChoiceItem):
            found.append((item.prompt, item.choices[item.label]))
        else:
            assert isinstance(item, GenerationItem), item
            found.append((item.prompt, item.references[0]))
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_is_what_is_asked(name: str) -> None:
    format, values, settings = CASES[name]
    for_training = trained(format, Record(values, "here"), settings)
    for_evaluation = asked(format, Record(values, "here"), settings)
    assert len(for_training) == (2 if "several" in name else 1)
    assert [prompt for prompt, _ in for_training] == [prompt for prompt, _ in for_evaluation]
    assert [a.strip() for _, a in for_training] == [a.strip() for _, a in for_evaluation]


def test_every_reference_is_right_in_the_words_of_the_template() -> None:
    format, values, settings = CASES["generation, templates"]
    [item] = items_of_records(
        [Record(values, "here")], own_format(TaskSection(task=format, **settings)), "mine"
    )
    assert isinstance(item, GenerationItem)
    assert item.references == ("so.", "thus.")


def test_every_own_task_is_a_format_of_training() -> None:
    assert set(OWN) <= set(FORMATS)


@pytest.mark.parametrize("settings", [{"fields": {"nobody": "x"}}, {"prompt": "{question"}], ids=str)
@pytest.mark.parametrize("format", OWN)
def test_what_one_refuses_the_other_refuses(format: str, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError) as in_training:
        make_renderer(format, None, **settings)
    with pytest.raises(DataError) as in_evaluation:
        own_format(TaskSection(task=format, **settings))
    assert str(in_training.value).replace(f"format {format!r}", "task") == str(in_evaluation.value)
