"""The rows of points.jsonl for a report: every line is a point, or a broken row and what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ssmlora_dist.errors import DataError
from ssmlora_dist.records import nearest_name
from ssmlora_dist.sweep.directory import Outcome

FINISHED = "finished"
OUTCOMES = get_args(Outcome)


@dataclass(frozen=True)
class PointResult:
    """What became of one point of a sweep.

    Args:
        name: unique among the points.
        group: the method or family it belongs to.
        seed: of the run.
        outcome: one of `OUTCOMES`.
        reason: why it did not finish.
        overrides: dotted keys of the run configuration to their values.
        metrics: name to value; those that are not finite are as they were logged.
        wall_seconds: how long it took.
    """

    name: str
    group: str
    seed: int
    outcome: str
    reason: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    wall_seconds: float | None = None

    @property
    def is_finished(self) -> bool:
        return self.outcome == FINISHED


@dataclass(frozen=True)
class BrokenRow:
    """A line that is no point.

    Args:
        line: its number, from 1.
        problem: what is wrong with it.
    """

    line: int
    problem: str


def is_share(metric: str) -> bool:
    """Whether a metric is a score from 0 to 1, by its name."""
    return metric.startswith("task/") or "exact_match" in metric or "accuracy" in metric


def read_rows(path: Path) -> tuple[list[PointResult], list[BrokenRow]]:
    """Points and broken rows, each in the order of the file; blank lines are nothing.

    Raises:
        DataError: the file is not there or cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); name a sweep directory, which holds points.jsonl, "
            "or a file of such rows"
        ) from None
    points: dict[str, PointResult] = {}
    line_of: dict[str, int] = {}
    broken = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            point = _point(line)
            if point.name in line_of:
                raise ValueError(
                    f"point {point.name!r} is in line {line_of[point.name]} already; names are unique"
                )
        except ValueError as error:
            broken.append(BrokenRow(number, printable(str(error))))
            continue
        points[point.name], line_of[point.name] = point, number
    return list(points.values()), broken


def _point(line: bytes) -> PointResult:
    """Raises a ValueError that says what is wrong."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("no UTF-8 text") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"needed: a JSON object; given: {_shown(row)}")
    outcome = _value(row, "outcome", str)
    if outcome not in OUTCOMES:
        raise ValueError(
            f"outcome: {_shown(outcome)}{nearest_name(outcome, OUTCOMES)}; allowed: {', '.join(OUTCOMES)}"
        )
    wall_seconds = _value(row, "wall_seconds", (int, float), None)
    return PointResult(
        name=_name(row, "point"),
        group=_name(row, "group"),
        seed=_value(row, "seed", int),
        outcome=outcome,
        reason=printable(_value(row, "reason", str, None) or "") or None,
        overrides={printable(key): value for key, value in _value(row, "overrides", dict, {}).items()},
        metrics=_metrics(_value(row, "metrics", dict, {})),
        wall_seconds=None if wall_seconds is None else _as_float(wall_seconds),
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    metrics = {}
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"metrics.{name}: {_shown(value)}; allowed: a number")
        number = _as_float(value)
        if is_share(name) and not math.isnan(number) and not 0 <= number <= 1:
            raise ValueError(f"metrics.{name}: {_shown(value)}; allowed: a score from 0 to 1")
        metrics[printable(name)] = number
    return metrics


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


_REQUIRED = object()


def _value(row: Mapping[str, Any], key: str, kind: Any, default: Any = _REQUIRED) -> Any:
    value = row.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if key not in row:
        present = ", ".join(row) or "nothing"
        raise ValueError(f"no {key!r}{nearest_name(key, row)}; it has: {present}")
    if isinstance(value, bool) or not isinstance(value, kind):
        expected = {str: "a text", int: "a whole number", dict: "an object"}.get(kind, "a number")
        raise ValueError(f"{key}: {_shown(value)}; allowed: {expected}")
    return value


def _name(row: Mapping[str, Any], key: str) -> str:
    name = printable(_value(row, key, str))
    if not name:
        raise ValueError(f"{key}: is empty; allowed: a name")
    return name


def printable(text: str) -> str:
    """Without control characters and lone surrogates, which no file of a report can hold; on one line."""
    kept = "".join(
        character if character.isprintable() or character.isspace() else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
    return " ".join(kept.split())


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."
