"""Pydantic's validation errors as lines for a person: where, value given, what is allowed, how to mend it.

What is allowed is read from the JSON schema of `RunConfig`, so that messages, editors and validation agree.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from ssmlora_dist.config.schema import LONGEST_NAME, RunConfig
from ssmlora_dist.config.shown import shown

KeyPath = tuple[str | int, ...]
Node = dict[str, Any]

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPE_NAMES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class Problem:
    """One mistake: its line, its key path, and the fields whose intended value is not known because of it."""

    line: str
    key_path: KeyPath
    doubtful: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Doubtful:
    """Fields that hold a stand-in because what was given for them is wrong: no rule judges by them."""

    fields: frozenset[str] = frozenset()

    def clear_of(self, *fields: str) -> bool:
        """Whether every one of `fields` holds what the user meant."""
        return not any(
            field == doubtful or field.startswith(f"{doubtful}.")
            for field in fields
            for doubtful in self.fields
        )


NONE_DOUBTFUL = Doubtful()


def describe(errors: Iterable[ErrorDetails], data: Node) -> list[Problem]:
    """One problem per mistake in `data`; the branches of a union count as one."""
    found: dict[KeyPath, ErrorDetails] = {}
    for error in errors:
        found.setdefault(key_path_of(error, data), error)
    inside = {key_path[:length] for key_path in found for length in range(len(key_path))}
    return [_problem(key_path, error) for key_path, error in found.items() if key_path not in inside]


def dotted(key_path: Sequence[str | int]) -> str:
    """`("data", "train", "path", 0)` as `data.train.path.0`."""
    return ".".join(str(part) for part in key_path)


def close_to(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Those of `names`, at most three and the nearest first, that `name` may be a misspelling of."""
    by_folded = {candidate.casefold(): candidate for candidate in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=3, cutoff=cutoff)
    return [by_folded[folded] for folded in close]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` most likely is a misspelling of, if any comes close."""
    return next(iter(close_to(name, names)), None)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The remedy for a name that is none of `names`."""
    near = nearest(name, names)
    return f'did you mean "{near}"?' if near else "choose one of these"


def key_path_of(error: ErrorDetails, data: Any) -> KeyPath:
    """The path through `data` that an error is about, without pydantic's names of union branches."""
    key_path: list[str | int] = []
    here = data
    for part in error["loc"]:
        held = isinstance(here, dict) and part in here
        if held or (isinstance(here, list) and isinstance(part, int) and part < len(here)):
            here = here[part]
            key_path.append(part)
    last = error["loc"][-1] if error["loc"] else None
    if error["type"] == "missing" and isinstance(last, str):
        key_path.append(last)
    return tuple(key_path)


def _problem(key_path: KeyPath, error: ErrorDetails) -> Problem:
    kind = error["type"]
    # A list with one wrong value in it is left out as a whole.
    doubtful = [dotted(tuple(itertools.takewhile(lambda part: isinstance(part, str), key_path)))]
    if kind == "extra_forbidden":
        line, meant = _unknown_key(key_path, error["input"])
        doubtful.extend(meant)
    elif kind == "missing" and isinstance(error["loc"][-1], str):
        where = f"to {dotted(key_path[:-1])}" if len(key_path) > 1 else "at the top level"
        line = (
            f'{dotted(key_path)}: missing; allowed: {_allowed(_node(key_path))}; add "{key_path[-1]}" {where}'
        )
    elif kind == "value_error":
        line = f"{dotted(key_path)}: {error['ctx']['error']}"
    else:
        node, value = _node(key_path), error["input"]
        line = f"{dotted(key_path)}: {shown(value)} given; allowed: {_allowed(node)}; {_remedy(value, node)}"
    return Problem(line, key_path, tuple(doubtful), kind)


def _unknown_key(key_path: KeyPath, value: Any) -> tuple[str, list[str]]:
    """The line for a key that its section does not have, and the fields that were probably meant."""
    section, key = key_path[:-1], str(key_path[-1])
    here = list(_properties(section))
    names = [dotted(path) for path in _probably_meant(section, key, here)]
    guess = f"did you mean {' or '.join(names[:3])}?" if names else "remove it"
    where = f"in {dotted(section)}" if section else "at the top level"
    line = (
        f"{dotted(key_path)}: unknown key ({shown(value)} given); allowed {where}: {', '.join(here)}; {guess}"
    )
    return line, names


def _probably_meant(section: KeyPath, key: str, here: Sequence[str]) -> list[KeyPath]:
    """The fields of that very name elsewhere, or else of a similar name here, or else elsewhere."""

    def shared(path: KeyPath) -> int:
        pairs = zip(path, section, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def elsewhere(names: Sequence[str]) -> list[KeyPath]:
        return sorted((path for path in field_paths() if path[-1] in names), key=shared, reverse=True)

    if same := elsewhere([key]):
        return same
    if near := nearest(key, here):
        return [(*section, near)]
    return elsewhere(close_to(key, {str(path[-1]) for path in field_paths()}, cutoff=0.7))


@functools.cache
def _schema() -> Node:
    return RunConfig.model_json_schema(by_alias=True)


def _alternatives(node: Node) -> Iterator[Node]:
    """What a node may be: references followed, `anyOf` taken apart."""
    if "$ref" in node:
        yield from _alternatives(_schema()["$defs"][node["$ref"].rsplit("/", 1)[1]])
    elif "anyOf" in node:
        for member in node["anyOf"]:
            yield from _alternatives(member)
    else:
        yield node | {"enum": [node["const"]]} if "const" in node else node


def _node(key_path: KeyPath) -> Node:
    """The schema at `key_path`; empty where anything is allowed."""
    node = _schema()
    for part in key_path:
        node = next((child for alt in _alternatives(node) if (child := _child(alt, part)) is not None), {})
    return node


def _child(node: Node, part: str | int) -> Node | None:
    if isinstance(part, str):
        child = node.get("properties", {}).get(part, node.get("additionalProperties"))
    else:
        listed = node.get("prefixItems", [])
        child = listed[part] if part < len(listed) else node.get("items")
    return child if isinstance(child, dict) else None


def _properties(key_path: KeyPath) -> dict[str, Node]:
    """The keys that the section at `key_path` has."""
    return {
        key: value
        for alt in _alternatives(_node(key_path))
        for key, value in alt.get("properties", {}).items()
    }


@functools.cache
def field_paths() -> tuple[KeyPath, ...]:
    """The paths of all fields and sections."""

    def below(key_path: KeyPath) -> Iterator[KeyPath]:
        for key in _properties(key_path):
            yield (*key_path, key)
            yield from below((*key_path, key))

    return tuple(below(()))


def _options(node: Node) -> list[Any]:
    return [option for alt in _alternatives(node) for option in alt.get("enum", [])]


def _allowed(node: Node) -> str:
    """What a node accepts, in words."""
    return " or ".join(dict.fromkeys(_allowed_one(alt) for alt in _alternatives(node))) or "any value"


def _allowed_one(node: Node) -> str:
    if "enum" in node:
        return ", ".join(json.dumps(option) for option in node["enum"])
    kind = node.get("type")
    if kind in ("integer", "number"):
        bounds = [f"{sign} {node[key]}" for key, sign in _BOUNDS.items() if key in node]
        return " ".join([_TYPE_NAMES[kind], " and ".join(bounds)]).strip()
    if kind == "string":
        most = f" of at most {node['maxLength']} characters" if "maxLength" in node else ""
        if "pattern" in node:
            return f"text{most} of the form {node['pattern']}"
        return "text that is not empty" if node.get("minLength") else "text"
    if kind == "array":
        if "prefixItems" in node:
            return f"a list of {len(node['prefixItems'])}, each {_allowed(node['prefixItems'][0])}"
        least = f" of at least {node['minItems']}" if "minItems" in node else ""
        return f"a list{least}, each {_allowed(node['items'])}"
    if kind == "object":
        return (
            f"a section with the keys {', '.join(node['properties'])}"
            if "properties" in node
            else "an object"
        )
    return _TYPE_NAMES.get(str(kind), "any value")


def _remedy(value: Any, node: Node) -> str:
    """How to turn `value` into something that `node` accepts."""
    kinds = {alt.get("type") for alt in _alternatives(node) if "enum" not in alt}
    if isinstance(value, str) and (meant := _unquoted(value, kinds)) is not None:
        return f"write {meant} without quotes"
    options = _options(node)
    if options and isinstance(value, str):
        return did_you_mean(value, options)
    if options and not kinds:
        return "choose one of these"
    if isinstance(value, str) and "array" in kinds and value:
        return f"write a list: {json.dumps([part.strip() for part in value.split(',')])}"
    if isinstance(value, str) and any("pattern" in alt for alt in _alternatives(node)):
        mended = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-.")[:LONGEST_NAME]
        return f"write {json.dumps(mended)}" if mended else "choose a name"
    if isinstance(value, int | float) and not isinstance(value, bool) and "string" in kinds:
        return f'write it in quotes: "{value}"'
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return f"write {int(value)}"
    default = node.get("default")
    if value is None:
        return "leave the key out" + (f" to take the default {shown(default)}" if default is not None else "")
    return f"the default is {shown(default)}" if default is not None else "write a value that is allowed"


def _unquoted(text: str, kinds: set[Any]) -> str | None:
    """`text` as the number or truth value that it spells, when one is allowed."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, bool):
        return json.dumps(value) if "boolean" in kinds else None
    if isinstance(value, int) and kinds & {"integer", "number"}:
        return json.dumps(value)
    return json.dumps(value) if isinstance(value, float) and "number" in kinds else None
