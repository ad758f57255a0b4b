"""Items made of records by templates: multiple-choice and generation tasks whose data are files or hub rows.

The prompt and the choices are the same text that the training formats `multiple_choice` and
`long_document_qa` make of the same templates, so a model is asked as it was trained.

What a label may be, of the field `label` or what `fields` maps to it:

| label | means |
| --- | --- |
| a whole number | the choice of that position, counted from 0 |
| a letter, `A` or `a` | the choice of that position |
| the text of a choice | that choice |
| true, false (JSON) | of two choices the one that says so (yes or no, true or false), else 1 for true |

Anything else is an error: in particular the texts `"true"` and `"1"` where no choice reads so, since `"1"`
may count from 0 or from 1, and to many a program `"false"` is true. `labels` says what they mean, such as
`{"true": 1, "false": 0}`; where it is given it alone decides, and its names are labels as JSON writes them.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import ChoiceItem, FailedItem, GenerationItem, Item
from ssmlora_dist.records import Paths, Record, RecordView, Template, nearest_name

QUESTION_PROMPT = "Question: {question}\nAnswer:"

ItemFormat = Callable[[Record, str], Item]
"""Of a record and the id of its item. Raises DataError for a record that does not fit."""

Preparation = Callable[[Record], Iterable[Record]]
"""Of a record as it was read to one for each of its items."""

_SAYS = {"yes": True, "true": True, "no": False, "false": False}


class ChoiceFormat:
    """Records to questions with answers to choose from.

    Args:
        prompt: template of the prompt. Spaces at its end go to the choices: tokenizers join them to a word.
        choices: templates of the choices, each with the space between prompt and choice; without them they
            are the texts of the list field `choices`, each after a space.
        fields: the names that the templates use, `label` and `choices`, to paths in the records.
        labels: labels to positions of choices, counted from 0.

    Raises:
        DataError: a template is malformed, there is one choice alone, `fields` maps a name that nobody uses,
            or `labels` names a choice that there is not.
    """

    def __init__(
        self,
        prompt: str = QUESTION_PROMPT,
        choices: Sequence[str] | None = None,
        fields: Mapping[str, Paths] | None = None,
        labels: Mapping[str, int] | None = None,
    ) -> None:
        self._prompt = Template(prompt, "prompt")
        self._choices = [Template(text, f"choices[{i}]") for i, text in enumerate(choices or ())]
        self._fields = fields or {}
        self._labels = labels
        if len(self._choices) == 1:
            raise DataError("choices: 1 template given; needed: at least 2, or none for the field 'choices'")
        for name, position in (labels or {}).items():
            if position < 0 or (self._choices and position >= len(self._choices)):
                raise DataError(
                    f"labels.{name}: {position} given; allowed: the position of a choice, "
                    f"{_positions(len(self._choices))}"
                )
        used = {"label"} if self._choices else {"label", "choices"}
        _check_fields(self._fields, used, [self._prompt, *self._choices])

    def __call__(self, record: Record, id: str) -> ChoiceItem:
        view = RecordView(record, self._fields)
        prompt = self._prompt.render(view)
        choices = [choice.render(view) for choice in self._choices] or self._listed(view)
        for number, choice in enumerate(choices, start=1):
            if not choice.strip():
                raise DataError(
                    f"{view.place}: choice {number} of {len(choices)} is empty, so it has no likelihood; "
                    "mend the record or `choices`"
                )
        label = self._label(view, [choice.strip() for choice in choices])
        kept = prompt.rstrip(" ")
        spaces = prompt[len(kept) :]
        return ChoiceItem(id, kept, tuple(spaces + choice for choice in choices), label)

    def _listed(self, view: RecordView) -> list[str]:
        listed = view.value("choices")
        if not isinstance(listed, list) or len(listed) < 2:
            raise DataError(
                f"{view.place}: field {self._path('choices')!r} must be a list of at least two answers; mend "
                "the record, map `fields.choices` to such a list, or set `choices` to templates"
            )
        return [" " + view.as_text(choice, "choices") for choice in listed]

    def _label(self, view: RecordView, choices: Sequence[str]) -> int:
        value = view.value("label")
        if self._labels is not None:
            name = view.as_text(value, "label")
            position = self._labels.get(name.strip())
            if position is None or position >= len(choices):
                allowed = f"one of `labels`: {', '.join(map(repr, self._labels))}"
                raise self._wrong_label(view, value, choices, allowed)
            return position
        positions = set(_positions_named(value, choices))
        if len(positions) == 1:
            return positions.pop()
        raise self._wrong_label(view, value, choices, _allowed(choices), is_ambiguous=bool(positions))

    def _wrong_label(
        self, view: RecordView, value: Any, choices: Sequence[str], allowed: str, is_ambiguous: bool = False
    ) -> DataError:
        fault = "may mean several" if is_ambiguous else "is none"
        remedy = (
            "mend the record, map `fields.label` to the right field, or set `labels` to what its labels mean"
        )
        if value == -1:
            remedy = "-1 stands for a label that is kept secret: take another split"
        return DataError(
            f"{view.place}: field {self._path('label')!r} holds {value!r}, which {fault} of its "
            f"{len(choices)} choices; allowed: {allowed}; {remedy}"
        )

    def _path(self, name: str) -> Paths:
        return self._fields.get(name, name)


class GenerationFormat:
    """Records to questions that are answered in the model's own words.

    Args:
        prompt: template of the prompt; spaces at its end are left to the answer.
        max_new_tokens: where the answer is cut off.
        stop: texts before which the answer ends.
        fields: the names that the template uses, and `references`, to paths in the records; there, a text or
            a list of texts.

    Raises:
        DataError: the template is malformed, or `fields` maps a name that nobody uses.
    """

    def __init__(
        self,
        prompt: str = QUESTION_PROMPT,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = ("\n",),
        fields: Mapping[str, Paths] | None = None,
    ) -> None:
        self._prompt = Template(prompt, "prompt")
        self._fields = fields or {}
        self._max_new_tokens, self._stop = max_new_tokens, tuple(stop)
        _check_fields(self._fields, {"references"}, [self._prompt])

    def __call__(self, record: Record, id: str) -> GenerationItem:
        view = RecordView(record, self._fields)
        prompt = self._prompt.render(view).rstrip(" ")
        value = view.value("references")
        listed = value if isinstance(value, list) else [value]
        references = tuple(view.as_text(reference, "references") for reference in listed)
        if not references or not all(map(str.strip, references)):
            fault = "an empty reference" if references else "no reference"
            raise DataError(
                f"{view.place}: field {self._fields.get('references', 'references')!r} holds {fault}; give "
                "the question an answer, or remove it"
            )
        return GenerationItem(id, prompt, references, self._max_new_tokens, self._stop)


def items_of_records(
    records: Iterable[Record],
    format: ItemFormat,
    name: str,
    prepare: Preparation | None = None,
    limit: int | None = None,
) -> Iterator[Item | FailedItem]:
    """The items of records, in order; one that cannot be used comes as a `FailedItem` with its place.

    An item's id is the number of its record, counted from 0, and for records of several items their number
    after a dash.

    Args:
        records: what a source yields.
        format: makes an item of a record.
        name: the task's, for messages.
        prepare: makes of a record one for each of its items; without it a record is one item.
        limit: the most items, failed ones included.

    Raises:
        DataError: there is not one usable record; one message, with the reason of the first. Up to the first
            usable record nothing is yielded, so that settings which fit no record do not fail item by item.
    """
    held: list[FailedItem] = []
    has_usable = False
    for item in itertools.islice(_attempts(records, format, prepare), limit):
        if isinstance(item, FailedItem) and not has_usable:
            held.append(item)
            continue
        if not has_usable:
            yield from held
            has_usable = True
        yield item
    if not has_usable:
        reason = f"none of {len(held)} can be used; the first: {held[0].error}" if held else "there are none"
        raise DataError(f"records of the task {name!r}: {reason}")


def _attempts(
    records: Iterable[Record], format: ItemFormat, prepare: Preparation | None
) -> Iterator[Item | FailedItem]:
    for number, record in enumerate(records):
        try:
            parts = [record] if prepare is None else list(prepare(record))
        except DataError as error:
            yield FailedItem(str(number), str(error))
            continue
        for part_number, part in enumerate(parts):
            id = str(number) if len(parts) == 1 else f"{number}-{part_number}"
            try:
                yield format(part, id)
            except DataError as error:
                yield FailedItem(id, str(error))


def _positions_named(value: Any, choices: Sequence[str]) -> Iterator[int]:
    """The positions of the choices that a label may mean."""
    if isinstance(value, bool):
        meanings = [_SAYS.get(choice.lower()) for choice in choices]
        if set(meanings) == {True, False} and len(choices) == 2:
            yield meanings.index(value)
        elif len(choices) == 2:
            yield int(value)
    elif isinstance(value, int):
        yield from (value,) if 0 <= value < len(choices) else ()
    elif isinstance(value, str):
        text = value.strip()
        yield from (position for position, choice in enumerate(choices) if choice == text)
        letter = string.ascii_uppercase.find(text.upper()) if len(text) == 1 else -1
        yield from (letter,) if 0 <= letter < len(choices) else ()


def _allowed(choices: Sequence[str]) -> str:
    letters = f"a letter from A to {string.ascii_uppercase[min(len(choices), 26) - 1]}"
    truth = ", true or false" if len(choices) == 2 else ""
    return f"a whole number {_positions(len(choices))}, {letters}{truth}, the text of a choice"


def _positions(num_choices: int) -> str:
    return f"from 0 to {num_choices - 1}" if num_choices else "0 or more"


def _check_fields(fields: Mapping[str, Paths], used: set[str], templates: Sequence[Template]) -> None:
    used = {*used, *(name for template in templates for name in template.names)}
    for name in fields:
        if name not in used:
            raise DataError(
                f"fields.{name}: neither the task nor a template uses this name{nearest_name(name, used)}; "
                f"used are: {', '.join(sorted(used))}"
            )
