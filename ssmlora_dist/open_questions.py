"""Questions of records that are answered in free words: what training teaches and evaluation asks, read once.

| format | fields it needs | default prompt | default answer |
| --- | --- | --- | --- |
| instruction | instruction, output; input is optional | Instruction, Input, `Answer:` | ` {output}` |
| generation | question, references | Question, `Answer:` | ` {references}` |
| long_document_qa | document, question, answer | the document, Question, `Answer:` | ` {answer}` |

Templates may name any field of the records. An answer is appended to its prompt as it stands, so one of the
two brings the space between them. References, and answers about a document, may be lists: the first is
trained, and any of them is right. A document may be a list, joined line by line (the values of an object by
`: `), and a list of questions with a list of as many answers is a question for each. So the nested records of
QMSum are read with `fields`: `{"document": "meeting_transcripts", "question": "specific_query_list.query",
"answer": "specific_query_list.answer"}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.records import (
    QUESTION_PROMPT,
    Paths,
    Record,
    RecordView,
    Template,
    check_fields,
)

INSTRUCTION_PROMPT = "Instruction: {instruction}\nAnswer:"
_INPUT_PROMPT = Template("Instruction: {instruction}\nInput: {input}\nAnswer:", "prompt")
DOCUMENT_PROMPT = "{document}\n\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class OpenFormat:
    """How records of one kind ask.

    Args:
        names: that it looks up, whatever the templates.
        prompt: its default.
        answer: name of the field that holds the answer.
        has_references: whether that may be a list of right answers.
    """

    names: tuple[str, ...]
    prompt: str
    answer: str
    has_references: bool = True


OPEN_FORMATS: Mapping[str, OpenFormat] = {
    "instruction": OpenFormat(
        ("instruction", "input", "output"), INSTRUCTION_PROMPT, "output", has_references=False
    ),
    "generation": OpenFormat(("references",), QUESTION_PROMPT, "references"),
    "long_document_qa": OpenFormat(("document", "question", "answer"), DOCUMENT_PROMPT, "answer"),
}


@dataclass(frozen=True)
class OpenQuestion:
    """A question and its right answers.

    Args:
        where: where it came from, for messages.
        before: the prompt up to its document; all of it where there is none.
        document: what may be shortened; None where there is none.
        after: the prompt behind the document.
        answers: as they continue the prompt; at least one.
    """

    where: str
    before: str
    document: str | None
    after: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return f"{self.before}{self.document or ''}{self.after}"


class OpenReader:
    """Records to questions that are answered in free words.

    Args:
        format: one of `OPEN_FORMATS`.
        prompt: template of the prompt, by default the format's.
        answer: template of the answer, by default the format's.
        fields: the names that the format or the templates use, to paths in the records; several paths to one
            name are for lists, which are joined.
        user: of the fields, for messages.

    Raises:
        DataError: a template is malformed, `fields` maps a name that nobody uses, or the prompt about a
            document has no one place for it.
    """

    def __init__(
        self,
        format: str,
        prompt: str | None = None,
        answer: str | None = None,
        fields: Mapping[str, Paths] | None = None,
        user: str = "task",
    ) -> None:
        self._format, self._fields = OPEN_FORMATS[format], fields or {}
        self._has_prompt = prompt is not None
        self._prompt = Template(self._format.prompt if prompt is None else prompt, "prompt")
        self._answer = Template(f" {{{self._format.answer}}}" if answer is None else answer, "answer")
        self._has_document = "document" in self._format.names
        check_fields(self._fields, self._format.names, [self._prompt, self._answer], user)
        if self._has_document and self._prompt.names.count("document") != 1:
            raise DataError(
                f"prompt: {self._prompt.text!r} must hold {{document}} exactly once, so that it is known "
                "what may be shortened; map the field that holds the document with `fields.document`"
            )

    def singles(self, record: Record) -> Iterator[Record]:
        """A record once for each of its questions, for `read`.

        Raises:
            DataError: it has other numbers of questions and answers, or lacks them.
        """
        if not self._has_document:
            yield record
            return
        view = RecordView(record, self._fields)
        used = {*self._prompt.names, *self._answer.names} & {"question", "answer"}
        values = {name: view.value(name) for name in used}
        questions, answers = values.get("question"), values.get("answer")
        if not isinstance(questions, list):
            yield record.derived({**record.values, **values})
            return
        if not isinstance(answers, list) or len(answers) != len(questions):
            num_answers = len(answers) if isinstance(answers, list) else 1
            raise DataError(
                f"{record.where}: {len(questions)} questions but {num_answers} answers; mend the record so "
                "that every question has one"
            )
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
            asked = {"question": question, "answer": answer}
            yield record.derived({**record.values, **asked}, f"{record.where}, question {number}")

    def read(self, single: Record) -> OpenQuestion:
        """The question of a record that `singles` gave.

        Raises:
            DataError: the record does not fit.
        """
        # Those of single questions lie where the format has them, wherever they lay in the record.
        own = {"question": "question", "answer": "answer"} if self._has_document else {}
        fields = {**self._fields, **own}
        view = RecordView(single, fields)
        document, after = None, ""
        if self._has_document:
            document = _document_text(view)
            before, after = self._prompt.render_around(view, "document")
        else:
            before = self._prompt_for(view).render(view)
        return OpenQuestion(single.where, before, document, after, self._answers(single, view, fields))

    def _prompt_for(self, view: RecordView) -> Template:
        asks_about_input = not self._has_prompt and "input" in self._format.names
        if asks_about_input and view.has("input") and view.text("input").strip():
            return _INPUT_PROMPT
        return self._prompt

    def _answers(self, record: Record, view: RecordView, fields: Mapping[str, Paths]) -> tuple[str, ...]:
        name = self._format.answer
        value = view.value(name) if name in self._answer.names else None
        if not self._format.has_references or not isinstance(value, list):
            return (self._answer.render(view),)
        if not value:
            raise DataError(
                f"{view.where}: field {view.path(name)!r} is an empty list; give the question an answer, or "
                "remove it"
            )
        singles = (record.derived({**record.values, name: reference}) for reference in value)
        return tuple(self._answer.render(RecordView(each, {**fields, name: name})) for each in singles)


def _document_text(view: RecordView) -> str:
    value: Any = view.value("document")
    if not isinstance(value, list):
        return view.as_text(value, "document")
    lines = (item.values() if isinstance(item, dict) else [item] for item in value)
    return "\n".join(": ".join(view.as_text(part, "document") for part in line) for line in lines)
