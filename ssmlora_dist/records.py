"""A record with where it came from, values out of it by path, and templates over them."""

from __future__ import annotations

import difflib
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssmlora_dist.errors import DataError

MISSING = object()
QUESTION_PROMPT = "Question: {question}\nAnswer:"
SHOWN_FIELDS = 12

Paths = str | Sequence[str]


@dataclass(frozen=True)
class Record:
    """What a source yields.

    Args:
        values: field names to values, as read.
        where: file and line, or row, for messages.
        read: names of the fields that a view has looked up.
        unread: names of what is within a field and nobody looks up, as `messages[].id`.
    """

    values: Mapping[str, Any]
    where: str
    read: set[str] = field(default_factory=set, compare=False, repr=False)
    unread: set[str] = field(default_factory=set, compare=False, repr=False)

    def derived(self, values: Mapping[str, Any], where: str | None = None) -> Record:
        """A record made of this one, whose fields count as those of this one when they are looked up."""
        return Record(values, where or self.where, self.read, self.unread)

    def unused(self) -> list[str]:
        """Fields that nobody has looked up, or a part of them, but for those that hold nothing."""
        unused = [
            name for name, value in self.values.items() if name not in self.read and not _is_empty(value)
        ]
        return [*unused, *sorted(self.unread)]


def nearest_name(name: str, known: Iterable[str]) -> str:
    """` (nearest: x)`, or nothing where no known name is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest: {matches[0]})" if matches else ""


def resolve_path(value: Any, path: str) -> Any:
    """Follows `a.b.c` into nested objects; through a list it gives the list of what each item has there.

    Returns:
        The value, or `MISSING` where any step of the path does not exist.
    """
    if isinstance(value, Mapping):
        if path in value:
            return value[path]
        head, _, rest = path.partition(".")
        return resolve_path(value[head], rest) if rest and head in value else MISSING
    if isinstance(value, list):
        items = [resolve_path(item, path) for item in value]
        return MISSING if any(item is MISSING for item in items) else items
    return MISSING


class RecordView:
    """A record under the names that a format uses.

    Args:
        record: the record.
        fields: names to paths in the record (`question`, `target.span1_text`); a name that is not mapped is
            its own path. Several paths for one name are for lists, which are joined in that order.
    """

    def __init__(self, record: Record, fields: Mapping[str, Paths]) -> None:
        self.where = record.where
        self._record = record
        self._fields = fields

    def has(self, name: str) -> bool:
        """Whether the record has the field, and not null."""
        values = [self._resolve(path) for path in self._paths(name)]
        return not any(value is MISSING or value is None for value in values)

    def value(self, name: str) -> Any:
        """The value of a field.

        Raises:
            DataError: the record lacks the field, or it is null.
        """
        paths = self._paths(name)
        values = [self._value_at(name, path) for path in paths]
        if len(values) == 1:
            return values[0]
        for path, value in zip(paths, values, strict=True):
            if not isinstance(value, list):
                raise DataError(
                    f"{self.where}: field {path!r} is no list, but `fields.{name}` names several paths, "
                    "whose lists are joined; name one path"
                )
        return [item for value in values for item in value]

    def text(self, name: str) -> str:
        """The value of a field that is text, a number or true/false, as text."""
        return self.as_text(self.value(name), name)

    def as_text(self, value: Any, name: str) -> str:
        """A value that belongs to the field `name`, as text."""
        if isinstance(value, str):
            return value
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int | float):
            return str(value)
        if isinstance(value, list | Mapping):
            remedy = f"map `fields.{name}` to a text inside it, such as 'outer.inner'"
        else:
            remedy = "write it as text or a number, or remove the record"
        raise DataError(f"{self.where}: field {name!r} holds {_kind(value)} where text is needed; {remedy}")

    def path(self, name: str) -> Paths:
        """Where a field is in the record, for messages."""
        return self._fields.get(name, name)

    def _paths(self, name: str) -> Sequence[str]:
        paths = self.path(name)
        return [paths] if isinstance(paths, str) else paths

    def _resolve(self, path: str) -> Any:
        values = self._record.values
        self._record.read.add(path if path in values else path.partition(".")[0])
        return resolve_path(values, path)

    def _value_at(self, name: str, path: str) -> Any:
        value, values = self._resolve(path), self._record.values
        purpose = "" if name == path else f" for {name!r}"
        if value is MISSING:
            present = ", ".join(map(str, values)) or "none"
            raise DataError(
                f"{self.where}: the record has no field {path!r}{purpose}{nearest_name(path, values)}; "
                f"it has: {present}; mend the record, or name the right field in `fields`"
            )
        if value is None:
            raise DataError(
                f"{self.where}: field {path!r}{purpose} is null; give it a value or remove the record"
            )
        return value


class Template:
    """Text with `{name}` in the places of a record's fields; `{{` and `}}` are braces.

    Args:
        text: the template.
        setting: the setting it came from, for messages.

    Raises:
        DataError: the template is malformed.
    """

    def __init__(self, text: str, setting: str) -> None:
        self.text = text
        self.setting = setting
        self._parts: list[tuple[str, str | None]] = []
        try:
            for literal, name, spec, conversion in string.Formatter().parse(text):
                if name is not None and (not name or spec or conversion):
                    raise ValueError("a place is a field's name in braces and nothing else")
                self._parts.append((literal, name))
        except ValueError as error:
            raise DataError(
                f"{setting}: {text!r} is no template ({error}); write {{name}} for a field and "
                "{{ }} for braces"
            ) from None

    @property
    def names(self) -> list[str]:
        return [name for _, name in self._parts if name is not None]

    def render(self, view: RecordView) -> str:
        return _render(self._parts, view)

    def render_around(self, view: RecordView, inner: str) -> tuple[str, str]:
        """The rendered text before and after the place of `inner`."""
        at = [name for _, name in self._parts].index(inner)
        literal, _ = self._parts[at]
        return _render(self._parts[:at], view) + literal, _render(self._parts[at + 1 :], view)


def check_fields(
    fields: Mapping[str, Paths], used: Iterable[str], templates: Iterable[Template], user: str = "task"
) -> None:
    """Finds names in `fields` that neither their user nor a template looks up.

    Raises:
        DataError: there is one.
    """
    used = sorted({*used, *(name for template in templates for name in template.names)})
    for name in fields:
        if name not in used:
            raise DataError(
                f"fields.{name}: neither the {user} nor a template uses this name{nearest_name(name, used)}; "
                f"used are: {', '.join(used)}"
            )


@dataclass
class UnusedFields:
    """Counts fields that nobody has looked up, over records that have been used."""

    num_records: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        self.num_records += 1
        self.counts.update(record.unused())

    def text(self) -> str | None:
        """Names and counts, if there are any."""
        return unused_fields_text(self.counts, self.num_records) if self.counts else None


def unused_fields_text(counts: Mapping[str, int], num_records: int) -> str:
    """Fields that nobody has looked up and in how many of the records they are, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = [
        name if count == num_records else f"{name} (in {count} of {num_records} records)"
        for name, count in ordered[:SHOWN_FIELDS]
    ]
    more = len(ordered) - len(shown)
    return "fields not used: " + ", ".join([*shown, f"and {more} more"] if more else shown)


def _render(parts: Iterable[tuple[str, str | None]], view: RecordView) -> str:
    return "".join(literal + ("" if name is None else view.text(name)) for literal, name in parts)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"
