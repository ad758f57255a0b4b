"""A sweep's points, and the cases they make up: what differs in the seed alone, with means over the seeds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from ssmlora_dist.evaluation.statistics import estimate, student_t_estimate
from ssmlora_dist.sweep.rows import BrokenRow, PointResult, is_share, printable

SPEED_METRICS = (
    "num_ranks",
    "tokens_per_second",
    "target_tokens_per_second",
    "tokens_per_second_per_device",
    "step_seconds",
    "peak_memory_gib",
    "num_trainable_parameters",
)
# What differs from point to point without making it another case.
NOT_SETTINGS = frozenset({"run.seed", "run.name", "run.output_dir"})
# The first that differs between points is the length that they were trained at.
LENGTH_KEYS = ("data.max_length", "data.train.task.lengths", "data.validation.task.lengths")
UNSET = "as base"

# Of a score there are NAME, of all inputs, NAME/LENGTH and NAME/LENGTH/DEPTH.
_METRIC = re.compile(
    r"(?P<name>(?:task/)?.+?)(?:/(?P<length>[1-9][0-9]{0,14})(?:/(?P<depth>0|1|0\.[0-9]*[1-9]))?)?",
    re.DOTALL,
)
# Beyond this a figure is none that anyone measured, and the square of it no float.
LARGEST = 1e100

Setting = tuple[tuple[str, str], ...]
"""Dotted keys with their values as text, in the order of the sweep's setting keys."""


@dataclass(frozen=True)
class Measured:
    """A mean over seeds with its 95% interval.

    Attributes:
        mean, lower, upper: the interval is the whole line where there is one value.
        count: seeds that it is of.
    """

    mean: float
    lower: float
    upper: float
    count: int


@dataclass(frozen=True)
class MetricPart:
    """What a metric is of.

    Attributes:
        metric: its full name.
        name: without length and depth.
        length: tokens of the inputs; None: of all.
        depth: of the fact in them, from 0 to 1; None: of all.
    """

    metric: str
    name: str
    length: int | None
    depth: float | None


@dataclass(frozen=True)
class Case:
    """The points that differ in their seed alone.

    Attributes:
        group, setting: what they have in common.
        points: in the order of their seeds.
        length: tokens that they were trained at; None where they leave it to the base configuration.
    """

    group: str
    setting: Setting
    points: tuple[PointResult, ...]
    length: int | None = None

    @property
    def unfinished(self) -> list[PointResult]:
        return [point for point in self.points if not point.is_finished]

    @property
    def seeds(self) -> set[int]:
        """Of the points that finished."""
        return {point.seed for point in self.points if point.is_finished}

    @property
    def metrics(self) -> set[str]:
        """Names that a finished point has."""
        return {name for point in self.points if point.is_finished for name in point.metrics}

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric of the finished points, as far as it can be counted; the mean of points with one seed."""
        values: dict[int, list[float]] = {}
        for point in self.points:
            value = point.metrics.get(metric, math.nan)
            if point.is_finished and is_countable(value):
                values.setdefault(point.seed, []).append(value)
        return {seed: fmean(values[seed]) for seed in sorted(values)}

    def measure(self, metric: str) -> Measured | None:
        """Mean and interval over the seeds; None where no finished point has the metric."""
        return measure(list(self.by_seed(metric).values()), is_share(metric))


@dataclass(frozen=True)
class Sweep:
    """The points of a sweep, each part in an order that does not depend on the rows'.

    Attributes:
        name: of the sweep.
        points: the baseline's first, then by group, setting and seed.
        broken: rows that are no points.
        baseline: the group that the others are compared with, if any.
    """

    name: str
    points: tuple[PointResult, ...]
    broken: tuple[BrokenRow, ...] = ()
    baseline: str | None = None

    @cached_property
    def setting_keys(self) -> list[str]:
        """Overridden keys that tell apart points of one group, so that they are no part of the method."""
        return _distinguishing_keys(self.points)

    @cached_property
    def shown_keys(self) -> list[str]:
        """The setting keys without those that are one value, or follow from an earlier one."""
        kept: list[str] = []
        for key in self.setting_keys:
            varies = len({text_of(point.overrides, key) for point in self.points}) > 1
            if varies and not any(self._follows(key, other) for other in kept):
                kept.append(key)
        return kept

    @cached_property
    def length_keys(self) -> frozenset[str]:
        """The setting keys that are a length or follow from it: what an axis of lengths sets."""
        following = {
            key for key in self.setting_keys if self._length_key and self._follows(key, self._length_key)
        }
        return frozenset(following | (set(LENGTH_KEYS) & set(self.setting_keys)))

    @cached_property
    def _length_key(self) -> str | None:
        known = [key for key in LENGTH_KEYS if key in self.setting_keys]
        varying = (key for key in known if len({text_of(point.overrides, key) for point in self.points}) > 1)
        return next(varying, next(iter(known), None))

    def _follows(self, key: str, other: str) -> bool:
        """Whether points that agree in `other` agree in `key`."""
        pairs = {(text_of(point.overrides, other), text_of(point.overrides, key)) for point in self.points}
        return len(pairs) == len({value for value, _ in pairs})

    @cached_property
    def cases(self) -> list[Case]:
        """In the order of the points."""
        found: dict[tuple[str, Setting], list[PointResult]] = {}
        for point in self.points:
            found.setdefault((point.group, setting_of(point, self.setting_keys)), []).append(point)
        key = self._length_key
        return [
            Case(group, setting, tuple(points), length_of(points[0].overrides.get(key)) if key else None)
            for (group, setting), points in found.items()
        ]

    @cached_property
    def metrics(self) -> list[str]:
        """Metrics over all inputs, not by length and depth: losses and scores, tasks, then speed."""
        names = {part.metric for part in self._parts if part.length is None}
        others = sorted(
            names - set(SPEED_METRICS), key=lambda name: (name.startswith("task/"), natural(name))
        )
        return [*others, *(name for name in SPEED_METRICS if name in names)]

    @cached_property
    def scores(self) -> list[str]:
        """Of `metrics`, the scores from 0 to 1 that a point ended with."""
        return [name for name in self.metrics if is_share(name) and not is_of_before(name)]

    @cached_property
    def measured_by_length(self) -> list[str]:
        """Losses and scores that a point ended with, of which there are values by input length."""
        names = {part.name for part in self._parts if part.length is not None and not is_of_before(part.name)}
        return sorted(names, key=natural)

    @cached_property
    def _parts(self) -> list[MetricPart]:
        return [part_of(name) for name in sorted({name for point in self.points for name in point.metrics})]

    def shown_setting(self, setting: Setting) -> Setting:
        """Without the keys that are not shown."""
        return tuple((key, value) for key, value in setting if key in self.shown_keys)


def ordered_sweep(
    name: str, points: Iterable[PointResult], broken: Iterable[BrokenRow] = (), baseline: str | None = None
) -> Sweep:
    """A sweep with its points in order, whatever the order they come in."""
    known = list(points)
    keys = _distinguishing_keys(known)

    def order(point: PointResult) -> Any:
        setting = [natural(value) for _, value in setting_of(point, keys)]
        return point.group != baseline, natural(point.group), setting, point.seed, natural(point.name)

    return Sweep(name, tuple(sorted(known, key=order)), tuple(broken), baseline)


def is_countable(value: float) -> bool:
    """Whether a mean can have a value in it: not NaN, and of a size that a float's square has too."""
    return abs(value) <= LARGEST


def measure(values: Sequence[float], is_score: bool) -> Measured | None:
    """Mean over the seeds and its interval; None without values.

    Student's, or for scores from 0 to 1 that of `statistics.estimate`, which keeps to the range and is not
    certain where scores do not spread.
    """
    values = [value for value in values if is_countable(value)]
    if not values:
        return None
    found = estimate(values) if is_score and len(values) > 1 else student_t_estimate(values)
    return Measured(found.mean, found.lower, found.upper, len(values))


def setting_of(point: PointResult, keys: Iterable[str]) -> Setting:
    """What a point has under `keys`."""
    return tuple((key, text_of(point.overrides, key)) for key in keys)


def text_of(overrides: Mapping[str, Any], key: str) -> str:
    """The value of an override as text."""
    if key not in overrides:
        return UNSET
    value = overrides[key]
    return printable(
        value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    )


def is_of_before(metric: str) -> bool:
    """Whether a metric is of the base model, before training: the same with every method."""
    return metric.endswith("_before") and not metric.startswith("task/")


def part_of(metric: str) -> MetricPart:
    """What a metric is of, by its name."""
    match = _METRIC.fullmatch(metric)
    if match is None:
        return MetricPart(metric, metric, None, None)
    length, depth = match["length"], match["depth"]
    return MetricPart(metric, match["name"], int(length) if length else None, float(depth) if depth else None)


def natural(text: str) -> tuple[Any, ...]:
    """A sort key: numbers by their value and before words, words with the numbers in them by value."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return 0, number, text
    # As many digits at a time as any number has, since Python refuses to read thousands.
    parts = re.split(r"([0-9]{1,18})", text)
    # Words and numbers take turns, so that like is compared with like.
    return 1, [int(part) if index % 2 else part for index, part in enumerate(parts)], text


def length_of(value: Any) -> int | None:
    """What a length key is set to: a number of tokens, or a list of one; None if it is neither."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 < value < 10**15 else None


def _distinguishing_keys(points: Sequence[PointResult]) -> list[str]:
    keys = {key for point in points for key in point.overrides} - NOT_SETTINGS
    values: dict[tuple[str, str], set[str]] = {}
    for point in points:
        for key in keys:
            values.setdefault((point.group, key), set()).add(text_of(point.overrides, key))
    varying = {key for (_, key), texts in values.items() if len(texts) > 1}
    # A length is never the method: what is measured at one is not compared with what is measured at another.
    found = varying | (keys & set(LENGTH_KEYS))
    # Lengths first, since other keys follow from them; the number of ranks last, since it says less than how
    # they are used.
    return sorted(found, key=lambda key: (key not in LENGTH_KEYS, key.startswith("launcher."), key))
