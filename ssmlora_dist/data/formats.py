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
from ssmlora_dist.records import Paths, Record, RecordView, Template, nearest_name
from ssmlora_dist.tokenization import TextEncoder

INSTRUCTION_PROMPT = Template("Instruction: {instruction}\nAnswer:", "prompt")
INSTRUCTION_INPUT_PROMPT = Template("Instruction: {instruction}\nInput: {input}\nAnswer:", "prompt")
INSTRUCTION_ANSWER = Template(" {output}", "answer")
MULTIPLE_CHOICE_PROMPT = Template("Question: {question}\nAnswer:", "prompt")
LONG_DOCUMENT_PROMPT = Template("{document}\n\nQuestion: {question}\nAnswer:", "prompt")
LONG_DOCUMENT_ANSWER = Template(" {answer}", "answer")

# Format -> the names it looks up, and the settings it takes.
FORMATS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "instruction": (("instruction", "input", "output"), ("prompt", "answer")),
    "chat": (("messages", "tools"), ()),
    "text": (("text",), ()),
    "multiple_choice": (("question", "choices", "label"), ("prompt", "choices")),
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

    Raises:
        DataError: a setting does not belong to the format, a template is malformed, `fields` maps a name that
            nobody uses, or the tokenizer has no chat template. The function itself raises it for a record
            that does not fit.
    """
    fields = fields or {}
    templates = {
        "prompt": prompt,
        "answer": answer,
        **{f"choices[{i}]": c for i, c in enumerate(choices or ())},
    }
    parsed = {name: Template(text, name) for name, text in templates.items() if text is not None}
    _check_settings(format, fields, parsed)
    prompt_template, answer_template = parsed.get("prompt"), parsed.get("answer")
    if format == "instruction":
        return _Instruction(fields, prompt_template, answer_template or INSTRUCTION_ANSWER)
    if format == "chat":
        return _Chat(fields, tokenizer)
    if format == "text":
        return _Text(fields)
    if format == "multiple_choice":
        choice_templates = [parsed[f"choices[{i}]"] for i in range(len(choices or ()))]
        return _MultipleChoice(fields, prompt_template or MULTIPLE_CHOICE_PROMPT, choice_templates)
    return _LongDocument(
        fields, prompt_template or LONG_DOCUMENT_PROMPT, answer_template or LONG_DOCUMENT_ANSWER
    )


def _check_settings(format: str, fields: Mapping[str, Paths], templates: Mapping[str, Template]) -> None:
    names, settings = FORMATS[format]
    for setting in templates:
        if setting.partition("[")[0] not in settings:
            allowed = f"it takes {' and '.join(settings)}" if settings else "it takes no templates"
            raise DataError(f"{setting}: does not belong to the format {format!r}; {allowed}; remove it")
    used = {*names, *(name for template in templates.values() for name in template.names)}
    for name in fields:
        if name not in used:
            raise DataError(
                f"fields.{name}: neither the format {format!r} nor a template uses this name"
                f"{nearest_name(name, used)}; used are: {', '.join(sorted(used))}"
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
        # Of prompt and answer the longer one gives way: a long passage as well as a long essay survive.
        context = Segment(prompt, may_shrink=len(prompt) >= len(answer))
        return [Row(record.place, _with_answer([context], answer))]

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
        messages, unread = read_messages(view.value("messages"), record.place, self.template.mentions)
        tools = read_tools(view.value("tools"), record.place) if view.has("tools") else None
        return chat_rows(messages, tools, self.template, self.encoder, record.place)


@dataclass(frozen=True)
class _Text:
    fields: Mapping[str, Paths]

    def __call__(self, record: Record) -> list[Row]:
        text = RecordView(record, self.fields).text("text")
        return [Row(record.place, (Segment(text, is_target=True),), may_split=record.is_document)]


@dataclass(frozen=True)
class _MultipleChoice:
    fields: Mapping[str, Paths]
    prompt: Template
    choices: Sequence[Template]

    def __call__(self, record: Record) -> list[Row]:
        view = RecordView(record, self.fields)
        label = _label(view)
        num_choices = len(self.choices) or len(self._listed(view))
        if not 0 <= label < num_choices:
            raise DataError(
                f"{record.place}: label {label} is out of range: with {num_choices} choices it must be from "
                f"0 to {num_choices - 1}; mend the record or `choices`"
            )
        if self.choices:
            answer = self.choices[label].render(view)
        else:
            answer = " " + view.as_text(self._listed(view)[label], "choices")
        context = Segment(self.prompt.render(view), may_shrink=True)
        return [Row(record.place, _with_answer([context], answer))]

    @staticmethod
    def _listed(view: RecordView) -> list[Any]:
        listed = view.value("choices")
        if not isinstance(listed, list) or not listed:
            raise DataError(
                f"{view.place}: field 'choices' must be a list of answers; mend the record, or set `choices` "
                "to templates of them"
            )
        return listed


def _label(view: RecordView) -> int:
    value = view.value("label")
    if isinstance(value, str):
        words = {"false": 0, "true": 1}
        word = value.strip().lower()
        if word in words:
            return words[word]
        if word.isascii() and word.removeprefix("-").isdigit():
            return int(word)
    elif isinstance(value, int):
        return int(value)
    raise DataError(
        f"{view.place}: label {value!r} is neither the number of a choice (counted from 0) nor true or "
        "false; mend the record, or map `fields.label` to the right field"
    )


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
            rows.append(Row(single.place, _with_answer(context, self.answer.render(single_view))))
        return rows

    def _single_questions(self, record: Record, view: RecordView) -> Iterator[Record]:
        """The record once for each of its questions, under the format's own names."""
        used = {*self.prompt.names, *self.answer.names} & {"question", "answer"}
        values = {name: view.value(name) for name in used}
        questions, answers = values.get("question"), values.get("answer")
        if not isinstance(questions, list):
            asked = {name: _first_reference(view, value) for name, value in values.items()}
            yield Record({**record.values, **asked}, record.place)
            return
        if not isinstance(answers, list) or len(answers) != len(questions):
            num_answers = len(answers) if isinstance(answers, list) else 1
            raise DataError(
                f"{record.place}: {len(questions)} questions but {num_answers} answers; mend the record so "
                "that every question has one"
            )
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
            asked = {"question": question, "answer": _first_reference(view, answer)}
            yield Record({**record.values, **asked}, f"{record.place}, question {number}")


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
            f"{view.place}: field 'answer' is an empty list; give the question an answer or remove it"
        )
    return answer[0]
