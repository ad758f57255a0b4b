"""Records to rows: defaults, templates, mapped fields, and records that do not fit."""

from __future__ import annotations

import pytest

from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.errors import DataError
from ssmlora_dist.records import Record


def render(format, values, **settings):
    """Rows as (context, answer) texts."""
    rows = make_renderer(format, None, **settings)(Record(values, "rows.jsonl:3"))
    assert all(row.segments[-1].is_target and not any(s.is_target for s in row.segments[:-1]) for row in rows)
    return [("".join(s.text for s in row.segments[:-1]), row.segments[-1].text) for row in rows]


def test_instruction_defaults():
    (row,) = render("instruction", {"instruction": "Add.", "input": "1 2", "output": 3})
    assert row == ("Instruction: Add.\nInput: 1 2\nAnswer:", " 3")
    for absent in ({}, {"input": ""}, {"input": None}):
        (row,) = render("instruction", {"instruction": "Say hi.", "output": "hi", **absent})
        assert row == ("Instruction: Say hi.\nAnswer:", " hi")


def test_instruction_templates_and_fields():
    values = {"q": {"text": "why"}, "a": "so", "topic": "t"}
    assert render("instruction", values, prompt="{topic}: {q.text}\n", answer="{a}") == [("t: why\n", "so")]
    assert render("instruction", values, fields={"instruction": "q.text", "output": "a"}) == [
        ("Instruction: why\nAnswer:", " so")
    ]


def test_spaces_before_the_answer_belong_to_it():
    """`Answer: ` + `yes` is encoded as `Answer:` + ` yes`, the way texts are."""
    assert render("instruction", {"a": "yes"}, prompt="Answer:  ", answer="{a}") == [("Answer:", "  yes")]


def test_text():
    (row,) = make_renderer("text", None, fields={"text": "body"})(Record({"body": "words"}, "x"))
    assert [(segment.text, segment.is_target) for segment in row.segments] == [("words", True)]
    assert row.may_split


def test_multiple_choice_templates():
    values = {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 1}
    prompt, choices = "{premise} What was the {question}?\nAnswer:", (" {choice1}", " {choice2}")
    expected = [("It rained. What was the effect?\nAnswer:", " Dry.")]
    assert render("multiple_choice", values, prompt=prompt, choices=choices) == expected


def test_multiple_choice_listed_in_the_record():
    values = {"question": "Which?", "choices": {"text": ["one", "two"]}, "answer": 1}
    fields = {"choices": "choices.text", "label": "answer"}
    assert render("multiple_choice", values, fields=fields) == [("Question: Which?\nAnswer:", " two")]


def test_long_document_defaults_and_references():
    values = {"passage": "Long text.", "question": "Who?", "answer": ["Mark", "Mark Hunter"]}
    expected = [("Long text.\n\nQuestion: Who?\nAnswer:", " Mark")]
    assert render("long_document_qa", values, fields={"document": "passage"}) == expected


def test_long_document_shrinks_in_the_document_only():
    values = {"document": "D", "question": "Q", "answer": "A"}
    (row,) = make_renderer("long_document_qa", None)(Record(values, "x"))
    assert [segment.text for segment in row.segments if segment.may_shrink] == ["D"]


def test_long_document_without_a_question():
    values = {"report": "Long text.", "summary": "Short."}
    settings = {"fields": {"document": "report"}, "prompt": "{document}\nIn short:", "answer": " {summary}"}
    assert render("long_document_qa", values, **settings) == [("Long text.\nIn short:", " Short.")]


MEETING = {
    "turns": [{"speaker": "A", "content": "Hello."}, {"speaker": "B", "content": "Bye."}],
    "general": [{"query": "Sum up.", "answer": "They met."}],
    "specific": [{"query": "Who left?", "answer": ["B", "B did"]}, {"query": "Who came?", "answer": "A"}],
}
MEETING_FIELDS = {
    "document": "turns",
    "question": ["general.query", "specific.query"],
    "answer": ["general.answer", "specific.answer"],
}


def test_long_document_with_nested_questions():
    rows = render("long_document_qa", MEETING, fields=MEETING_FIELDS)
    document = "A: Hello.\nB: Bye."
    assert rows == [
        (f"{document}\n\nQuestion: Sum up.\nAnswer:", " They met."),
        (f"{document}\n\nQuestion: Who left?\nAnswer:", " B"),
        (f"{document}\n\nQuestion: Who came?\nAnswer:", " A"),
    ]
    rows = make_renderer("long_document_qa", None, fields=MEETING_FIELDS)(Record(MEETING, "rows.jsonl:3"))
    assert rows[1].where == "rows.jsonl:3, question 2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": ["a", "b"]}, r"rows\.jsonl:3: 1 questions but 2 answers"),
        ({"answer": "a"}, r"rows\.jsonl:3: 1 questions but 1 answers"),
        ({"answer": [[]]}, r"rows\.jsonl:3, question 1: field 'answer' is an empty list"),
        ({"document": [[1]]}, r"rows\.jsonl:3, question 1: field 'document' holds a list where text is needed"),
        ({"question": [["q"]]}, r"rows\.jsonl:3, question 1: field 'question' holds a list"),
        ({"document": None}, r"rows\.jsonl:3, question 1: field 'document' is null"),
    ],
)
def test_long_document_records_that_do_not_fit(changes, message):
    with pytest.raises(DataError, match=message):
        render("long_document_qa", {"document": "d", "question": ["q"], "answer": ["a"], **changes})


@pytest.mark.parametrize("prompt", ["{question}", "{document} {document}", "{passage} {question}"])
def test_long_document_prompt_holds_the_document_once(prompt):
    with pytest.raises(DataError, match=r"prompt: .* must hold \{document\} exactly once"):
        make_renderer("long_document_qa", None, prompt=prompt)


@pytest.mark.parametrize(
    ("format", "settings", "message"),
    [
        ("instruction", {"choices": ("a", "b")}, r"choices: does not belong.*takes prompt and answer"),
        ("text", {"prompt": "p"}, r"prompt: does not belong to the format 'text'; it takes no templates"),
        ("multiple_choice", {"answer": "a"}, r"answer: does not belong"),
        ("instruction", {"labels": {"no": 0}}, r"labels: does not belong"),
        ("multiple_choice", {"choices": ("a", "b"), "labels": {"x": 2}}, r"^labels\.x: 2 given"),
        ("instruction", {"fields": {"outptu": "x"}}, r"fields\.outptu: neither.*nearest: output"),
        ("instruction", {"prompt": "{a"}, r"prompt: '\{a' is no template"),
    ],
)
def test_settings_that_do_not_fit_the_format(format, settings, message):
    with pytest.raises(DataError, match=message):
        make_renderer(format, None, **settings)


@pytest.mark.parametrize("format", ["instruction", "chat", "text", "multiple_choice", "long_document_qa"])
def test_every_format_names_the_field_that_is_missing(format, bpe_tokenizer):
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: the record has no field '\w+'.* it has: other"):
        make_renderer(format, bpe_tokenizer)(Record({"other": 1}, "rows.jsonl:3"))
