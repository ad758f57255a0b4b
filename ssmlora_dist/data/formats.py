"""Records to rows of text: what is context, what is trained, and what may give way when a row is too long.

| format | fields it needs | prompt and answer |
| --- | --- | --- |
| instruction, generation, long_document_qa | see `open_questions` | templates |
| multiple_choice | label, and choices unless given as templates; see `multiple_choice` | templates |
| chat | messages: objects with role and content; tools are optional | the tokenizer's chat template |
| text | text | |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssmlora_dist.data.chat import chat_rows
from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.data.messages import read_messages, read_tools
from ssmlora_dist.data.rows import Row, Segment
from ssmlora_dist.errors import DataError
from ssmlora_dist.multiple_choice import QuestionReader
from ssmlora_dist.open_questions import OPEN_FORMATS, OpenReader
from ssmlora_dist.records import Paths, Record, RecordView, check_fields
from ssmlora_dist.tokenization import TextEncoder

# Format -> the names it looks up, and the settings it takes.
FORMATS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction", "input", "output"), ("prompt", "answer")),
    "generation": (("question", "references"), ("prompt", "answer")),
    "long_document_qa": (("document", "question", "answer"), ("prompt", "answer")),
    "multiple_choice": (("question", "choices", "label"), ("prompt", "choices", "labels")),
    "chat": (("messages", "tools"), ()),
    "text": (("text",), ()),
}

Renderer = Callable[[Record], list[Row]]


def make_renderer(
    format: str,
    tokenizer: Any,
    fields: Mapping[str, Paths] | None = None,
    prompt: str | None = None,
    answer: str | None = None,
    choices: Sequence[str] | None = None,
    labels: Mapping[str, int] | None = None,
) -> Renderer:
    """Gives the function that turns a record into rows.

    Args:
        format: one of `FORMATS`.
        tokenizer: a transformers tokenizer; only its chat template is used.
        fields: the names that the format or the templates use, to paths in the records; several paths to
            one name are for lists, which are joined.
        prompt: template of the prompt.
        answer: template of the answer.
        choices: templates of the answers of multiple_choice, in the order that `label` counts.
        labels: what the labels of multiple_choice mean, as positions of choices from 0.

    Raises:
        DataError: a setting does not belong to the format, a template is malformed, `fields` maps a name that
            nobody uses, or the tokenizer has no chat template. The function itself raises it for a record
            that does not fit.
    """
    fields = fields or {}
    names, takes = FORMATS[format]
    settings = {"prompt": prompt, "answer": answer, "choices": choices, "labels": labels}
    for setting, value in settings.items():
        if value is not None and setting not in takes:
            allowed = f"it takes {' and '.join(takes)}" if takes else "it takes no templates"
            raise DataError(f"{setting}: does not belong to the format {format!r}; {allowed}; remove it")
    if format == "multiple_choice":
        return _MultipleChoice(QuestionReader(prompt, choices, fields, labels))
    if format in OPEN_FORMATS:
        return _Open(OpenReader(format, prompt, answer, fields, f"format {format!r}"))
    check_fields(fields, names, (), f"format {format!r}")
    return _Chat(fields, tokenizer) if format == "chat" else _Text(fields)


def _with_answer(context: Sequence[Segment], answer: str) -> tuple[Segment, ...]:
    """Context and answer; spaces at the context's end go to the answer: tokenizers join them to a word."""
    last = context[-1]
    kept = last.text.rstrip(" ")
    spaces = last.text[len(kept) :]
    return (*context[:-1], replace(last, text=kept), Segment(spaces + answer, is_target=True))


@dataclass(frozen=True)
class _Open:
    reader: OpenReader

    def __call__(self, record: Record) -> list[Row]:
        rows = []
        for question in map(self.reader.read, self.reader.singles(record)):
            context = [Segment(question.before)]
            if question.document is not None:
                context += [Segment(question.document, may_shrink=True), Segment(question.after)]
            rows.append(Row(question.where, _with_answer(context, question.answers[0])))
        return rows


class _Chat:
    def __init__(self, fields: Mapping[str, Paths], tokenizer: Any) -> None:
        self.fields = fields
        self.template = ChatTemplate(tokenizer)
        self.encoder = TextEncoder(tokenizer)

    def __call__(self, record: Record) -> list[Row]:
        view = RecordView(record, self.fields)
        messages, unread = read_messages(view.value("messages"), record.where, self.template)
        record.unread.update(f"messages[].{key}" for key in unread)
        tools = read_tools(view.value("tools"), record.where) if view.has("tools") else None
        return chat_rows(messages, tools, self.template, self.encoder, record.where)


@dataclass(frozen=True)
class _Text:
    fields: Mapping[str, Paths]

    def __call__(self, record: Record) -> list[Row]:
        text = RecordView(record, self.fields).text("text")
        return [Row(record.where, (Segment(text, is_target=True),), may_split=True)]


@dataclass(frozen=True)
class _MultipleChoice:
    questions: QuestionReader

    def __call__(self, record: Record) -> list[Row]:
        question = self.questions.read(record)
        answer = question.choices[question.position]
        return [Row(record.where, (Segment(question.prompt), Segment(answer, is_target=True)))]
