"""Multiple-choice questions of records: what training teaches and evaluation asks is read here, once.

What a label may be, of the field `label` or what `fields` maps to it:

| label | means |
| --- | --- |
| a whole number | the choice of that position, counted from 0 |
| the text of a choice, or the number that it is | that choice; white space around it aside |
| a letter: `B`, `b`, `(B)`, `B.`, `B)` | the choice of that position |
| true, false (JSON) | the choice that says so: yes, true, correct, right or no, false, incorrect, wrong |
| what all choices are marked with: `A. red`, `(2) blue`, `Option 3`, `4 stars` | the choice of that mark |
| -1 | a label that is kept secret: an error |

Every row that fits counts, and a label that may mean two choices is an error which names both: 2 of the
choices 1, 2 and 3, or `a` of the choices `b` and `a`. So is anything else, in particular true and false where
no choice says so, as of `ja` and `nein`, and the texts `"true"` and `"1"` where no choice reads so, since
`"1"` may count from 0 or from 1, and to many a program `"false"` is true. `labels` says what they mean, such
as `{"true": 1, "false": 0}`; where it is given it alone decides; its names are labels as JSON writes them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.records import QUESTION_PROMPT, Paths, Record, RecordView, Template, check_fields

_SAYS = {
    **dict.fromkeys(("yes", "true", "correct", "right"), True),
    **dict.fromkeys(("no", "false", "incorrect", "wrong"), False),
}

# At the beginning of a choice, or the only letter or number by itself in it.
_LEADING_MARK = re.compile(r"[(\[]?([A-Za-z]|\d{1,2})[.):\]]\s")
_LONE_MARKS = (re.compile(r"(?<!\w)\d+(?!\w)"), re.compile(r"(?<!\w)[A-Za-z](?!\w)"))
_LETTER = re.compile(r"\(?([A-Za-z])[.):]?")


@dataclass(frozen=True)
class Question:
    """A question with answers to choose from.

    Args:
        prompt: what comes before the answer, without spaces at its end.
        choices: the answers as they continue the prompt, these spaces included; at least two, none empty.
        position: of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    position: int


class QuestionReader:
    """Records to multiple-choice questions.

    Args:
        prompt: template of the prompt, by default `QUESTION_PROMPT`. Spaces at its end go to the choices:
            tokenizers join them to a word.
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
        prompt: str | None = None,
        choices: Sequence[str] | None = None,
        fields: Mapping[str, Paths] | None = None,
        labels: Mapping[str, int] | None = None,
    ) -> None:
        self._prompt = Template(QUESTION_PROMPT if prompt is None else prompt, "prompt")
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
        check_fields(self._fields, used, [self._prompt, *self._choices])

    def read(self, record: Record) -> Question:
        """The question of a record.

        Raises:
            DataError: the record does not fit.
        """
        view = RecordView(record, self._fields)
        prompt = self._prompt.render(view)
        choices = [choice.render(view) for choice in self._choices] or self._listed(view)
        for number, choice in enumerate(choices, start=1):
            if not choice.strip():
                raise DataError(
                    f"{view.where}: choice {number} of {len(choices)} is empty, so it has no likelihood; "
                    "mend the record or `choices`"
                )
        position = label_position(
            view.value("label"), [choice.strip() for choice in choices], view, self._labels
        )
        kept = prompt.rstrip(" ")
        spaces = prompt[len(kept) :]
        return Question(kept, tuple(spaces + choice for choice in choices), position)

    def _listed(self, view: RecordView) -> list[str]:
        listed = view.value("choices")
        if not isinstance(listed, list) or len(listed) < 2:
            raise DataError(
                f"{view.where}: field {view.path('choices')!r} must be a list of at least two answers; mend "
                "the record, map `fields.choices` to such a list, or set `choices` to templates"
            )
        return [" " + view.as_text(choice, "choices") for choice in listed]


def label_position(
    value: Any,
    choices: Sequence[str],
    view: RecordView,
    labels: Mapping[str, int] | None = None,
    name: str = "label",
) -> int:
    """The position of the choice that a label means.

    Args:
        value: the label.
        choices: the texts of the choices, without white space around them.
        view: of the record, for messages.
        labels: labels to positions; where given they alone decide.
        name: of the field.

    Raises:
        DataError: it means none of the choices, or may mean several.
    """
    readings = list(_mapped(value, labels, view, name) if labels is not None else _readings(value, choices))
    found = {position: how for position, how in readings if 0 <= position < len(choices)}
    if len(found) == 1:
        return next(iter(found))
    remedy = "mend the record, map `fields.label` to the right field, or set `labels` to what its labels mean"
    fault = "may mean several" if found else "is none"
    if found:
        which = "; ".join(f"position {at}, {choices[at]!r}, by its {how}" for at, how in found.items())
    elif labels is not None and readings:
        which = f"`labels` makes it position {readings[0][0]}; allowed: {_positions(len(choices))}"
    else:
        which = f"allowed: {_allowed(choices, labels)}"
        if str(value).strip() == "-1":
            remedy = "-1 stands for a label that is kept secret: take another split"
    shown = str(value).lower() if isinstance(value, bool) else repr(value)
    raise DataError(
        f"{view.where}: field {view.path(name)!r} holds {shown}, which {fault} of its {len(choices)} "
        f"choices; {which}; {remedy}"
    )


def _mapped(value: Any, labels: Mapping[str, int], view: RecordView, name: str) -> Iterator[tuple[int, str]]:
    label = view.as_text(value, name).strip()
    if label in labels:
        yield labels[label], "entry in `labels`"


def _readings(value: Any, choices: Sequence[str]) -> Iterator[tuple[int, str]]:
    """What a label may mean: positions, of which some may not exist, each with what makes it that one."""
    if isinstance(value, str):
        text = value.strip()
        letter = _LETTER.fullmatch(text)
        if letter:
            yield string.ascii_uppercase.index(letter[1].upper()), "letter"
    elif isinstance(value, bool):
        text = str(value).lower()
        yield from (
            (position, "meaning") for position, choice in enumerate(choices) if _says(choice) is value
        )
    elif isinstance(value, int | float):
        text = str(value)
        if isinstance(value, int):
            yield value, "number"
        yield from ((position, "text") for position, choice in enumerate(choices) if _number(choice) == value)
    else:
        return
    yield from ((position, "text") for position, choice in enumerate(choices) if choice == text)
    marks = [_mark(choice) for choice in choices]
    # Names can begin with initials, and amounts with numbers.
    letters, numbers = string.ascii_uppercase, list(map(str, range(len(choices) + 1)))
    if sorted(marks) in (list(letters[: len(marks)]), sorted(numbers[1:]), sorted(numbers[:-1])):
        mark = (_LETTER.fullmatch(text) or [text, text])[1].upper()
        yield from ((position, "mark") for position, other in enumerate(marks) if other == mark)


def _says(choice: str) -> bool | None:
    return _SAYS.get(choice.lower().strip(" .,;:!"))


def _mark(choice: str) -> str:
    """The letter or number that a choice goes by; nothing where there are several or none."""
    if leading := _LEADING_MARK.match(choice):
        return leading[1].upper()
    lone = next((found for marks in _LONE_MARKS if (found := marks.findall(choice))), [])
    # What is nothing but a letter or number is a text.
    return str(lone[0]).upper() if len(lone) == 1 and lone[0] != choice else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _allowed(choices: Sequence[str], labels: Mapping[str, int] | None) -> str:
    if labels is not None:
        return f"one of `labels`: {', '.join(map(repr, labels))}"
    letters = f"a letter from A to {string.ascii_uppercase[min(len(choices), 26) - 1]}"
    truth = ", true or false" if any(_says(choice) is not None for choice in choices) else ""
    return f"a whole number {_positions(len(choices))}, {letters}{truth}, the text of a choice"


def _positions(num_choices: int) -> str:
    return f"from 0 to {num_choices - 1}" if num_choices else "0 or more"
