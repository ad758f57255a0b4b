"""Records to rows of text: what is context, what is trained, and what may give way when a row is too long.

| format | fields it needs | default prompt | default answer |
| --- | --- | --- | --- |
| instruction | instruction, output; input is optional | Instruction, Input, `Answer:` | ` {output}` |
| chat | messages: objects with role and content; tools are optional | the tokenizer's chat template | |
| text | text | | |
| multiple_choice | label, and choices unless given as templates | Question, `Answer:` | the right choice |
| long_document_qa | document, question, answer | the document, Question, `Answer:` | ` {answer}` |

Templates may name any field of the records. An answer is appended to its prompt as it stands, so one of the
two brings the space between them. The fields of long_document_qa may be lists: a document is joined line by
line (the values of an object by `: `), an answer's first reference is trained, and a list of questions with a
list of as many answers gives an example for each. So the nested records of QMSum are read with `fields`:
`{"document": "meeting_transcripts", "question": "specific_query_list.query",
"answer": "specific_query_list.answer"}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssmlora_dist.data.chat import chat_rows
from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.data.messages import read_messages, read_tools
from ssmlora_dist.data.rows import Row, Segment
from ssmlora_dist.errors import DataError
from ssmlora_dist.multiple_choice import QuestionReader
from ssmlora_dist.records import Paths, Record, RecordView, Template, check_fields
from ssmlora_dist.tokenization import TextEncoder

INSTRUCTION_PROMPT = Template("Instruction: {instruction}\nAnswer:", "prompt")
INSTRUCTION_INPUT_PROMPT = Template("Instruction: {instruction}\nInput: {input}\nAnswer:", "prompt")
INSTRUCTION_ANSWER = Template(" {output}", "answer")
LONG_DOCUMENT_PROMPT = Template("{document}\n\nQuestion: {question}\nAnswer:", "prompt")
LONG_DOCUMENT_ANSWER = Template(" {answer}", "answer")

# Format -> the names it looks up, and the settings it takes.
FORMATS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction", "input", "output"), ("prompt", "answer")),
    "chat": (("messages", "tools"), ()),
    "text": (("text",), ()),
    "multiple_choice": (("question", "choices", "label"), ("prompt", "choices", "labels")),
    "long_document_qa": (("document", "question", "answer"), ("prompt", "answer")),
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
    prompt_template = None if prompt is None else Template(prompt, "prompt")
    answer_template = None if answer is None else Template(answer, "answer")
    templates = [template for template in (prompt_template, answer_template) if template is not None]
    check_fields(fields, names, templates, f"format {format!r}")
    if format == "instruction":
        return _Instruction(fields, prompt_template, answer_template or INSTRUCTION_ANSWER)
    if format == "chat":
        return _Chat(fields, tokenizer)
    if format == "text":
        return _Text(fields)
    return _LongDocument(
        fields, prompt_template or LONG_DOCUMENT_PROMPT, answer_template or LONG_DOCUMENT_ANSWER
    )


def _with_answer(context: Sequence[Segment], answer: str) -> tuple[Segment, ...]:
    """Context and answer; spaces at the context's end go to the answer: tokenizers join them to a word."""
    last = context[-1]
    kept = last.text.rstrip(" ")
    spaces = last.text[len(kept) :]
    return (*context[:-1], replace(last, text=kept), Segment(spaces + answer, is_target=True))


@dataclass(frozen=True)
class _Instruction:
    fields: Mapping[str, Paths]
    prompt: Template | None
    answer: Template

    def __call__(self, record: Record) -> list[Row]:
        view = RecordView(record, self.fields)
        prompt = self._prompt(view).render(view)
        answer = self.answer.render(view)
        return [Row(record.where, _with_answer([Segment(prompt)], answer))]

    def _prompt(self, view: RecordView) -> Template:
        if self.prompt is not None:
            return self.prompt
        has_input = view.has("input") and view.text("input").strip()
        return INSTRUCTION_INPUT_PROMPT if has_input else INSTRUCTION_PROMPT


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


@dataclass(frozen=True)
class _LongDocument:
    fields: Mapping[str, Paths]
    prompt: Template
    answer: Template

    def __post_init__(self) -> None:
        if self.prompt.names.count("document") != 1:
            raise DataError(
                f"prompt: {self.prompt.text!r} must hold {{document}} exactly once, so that it is known what "
                "may be shortened; map the field that holds the document with `fields.document`"
            )

    def __call__(self, record: Record) -> list[Row]:
        view = RecordView(record, self.fields)
        document = _document_text(view)
        rows = []
        for single in self._single_questions(record, view):
            single_view = RecordView(single, {**self.fields, "question": "question", "answer": "answer"})
            before, after = self.prompt.render_around(single_view, "document")
            context = [Segment(before), Segment(document, may_shrink=True), Segment(after)]
            rows.append(Row(single.where, _with_answer(context, self.answer.render(single_view))))
        return rows

    def _single_questions(self, record: Record, view: RecordView) -> Iterator[Record]:
        """The record once for each of its questions, under the format's own names."""
        used = {*self.prompt.names, *self.answer.names} & {"question", "answer"}
        values = {name: view.value(name) for name in used}
        questions, answers = values.get("question"), values.get("answer")
        if not isinstance(questions, list):
            asked = {name: _first_reference(view, value) for name, value in values.items()}
            yield record.derived({**record.values, **asked})
            return
        if not isinstance(answers, list) or len(answers) != len(questions):
            num_answers = len(answers) if isinstance(answers, list) else 1
            raise DataError(
                f"{record.where}: {len(questions)} questions but {num_answers} answers; mend the record so "
                "that every question has one"
            )
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
            asked = {"question": question, "answer": _first_reference(view, answer)}
            yield record.derived({**record.values, **asked}, f"{record.where}, question {number}")


def _document_text(view: RecordView) -> str:
    value = view.value("document")
    if not isinstance(value, list):
        return view.as_text(value, "document")
    lines = (item.values() if isinstance(item, dict) else [item] for item in value)
    return "\n".join(": ".join(view.as_text(part, "document") for part in line) for line in lines)


def _first_reference(view: RecordView, answer: Any) -> Any:
    if not isinstance(answer, list):
        return answer
    if not answer:
        raise DataError(
            f"{view.where}: field 'answer' is an empty list; give the question an answer or remove it"
        )
    return answer[0]
