"""Means of scores with their uncertainty, by group, and what always giving the same answer would score."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from ssmlora_dist.evaluation.items import (
    ChoiceItem,
    FailedItem,
    GenerationAnswer,
    GenerationItem,
    Item,
    Scorer,
)

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval that holds the true one, were such items drawn again, 95 times of 100."""

    mean: float
    lower: float
    upper: float


@dataclass(frozen=True)
class ItemScores:
    """What became of one item.

    Args:
        scores: metric to value; none for an item that failed.
        metadata: the item's.
    """

    scores: Mapping[str, float] | None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupSummary:
    """Scores over the items of one group.

    Attributes:
        group: what its items have in common, such as `{"length": 4096, "depth": 0.5}`; empty for all items.
        num_items: items that were scored.
        num_failed: items that could not be; they count in no mean.
        metrics: metric to its mean; empty where no item was scored.
    """

    group: Mapping[str, Any]
    num_items: int
    num_failed: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class Baseline:
    """What always giving one and the same answer scores.

    Attributes:
        score: mean over the items, in the task's metric.
        answer: that answer: a choice's text, `choice 2` for a position (counted from 1), or a reference.
    """

    score: float
    answer: str


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95% interval of scores from 0 to 1.

    Where every score is 0 or 1: Wilson's interval, which stays true for few items and for shares near 0
    and 1, where the mean plus or minus some standard errors leaves the range or shrinks to nothing. Otherwise
    Student's t interval, cut to the range: graded scores spread less than 0 and 1 do, and it uses that. Where
    they do not spread at all (a single one, or a few equal ones) they do not show how much they would, and
    Wilson's interval stands for the most that scores of their mean can spread.

    Raises:
        ValueError: no scores, or one outside of 0 to 1.
    """
    if not values or not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"needed: at least one score, each from 0 to 1; given: {list(values)[:5]}")
    count = len(values)
    mean = math.fsum(values) / count
    if all(value in (0.0, 1.0) for value in values) or min(values) == max(values):
        lower, upper = _wilson(mean, count)
    else:
        found = student_t_estimate(values)
        lower, upper = found.lower, found.upper
    return Estimate(mean, max(0.0, lower), min(1.0, upper))


def student_t_estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's 95% interval of numbers of any range; of a single one it is the whole line.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("needed: at least one value")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    if min(values) == max(values):
        # Their sum over their number can be another one, by rounding.
        return Estimate(values[0], values[0], values[0])
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    margin = student_t_quantile(0.5 + CONFIDENCE / 2, count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - margin, mean + margin)


def summarize(
    results: Iterable[ItemScores],
    group_by: Sequence[Sequence[str]] = (("length",), ("depth",), ("length", "depth")),
) -> list[GroupSummary]:
    """A task's results over all items, then by each grouping with its groups in ascending order.

    Args:
        results: of the task's items.
        group_by: names in the items' metadata that are held fixed together; an item that lacks one of them
            is in none of that grouping's groups.
    """
    listed = list(results)
    summaries = [_summary({}, listed)]
    for names in group_by:
        groups: dict[tuple[Any, ...], list[ItemScores]] = {}
        for result in listed:
            if all(result.metadata.get(name) is not None for name in names):
                groups.setdefault(tuple(result.metadata[name] for name in names), []).append(result)
        summaries += [
            _summary(dict(zip(names, values, strict=True)), groups[values]) for values in sorted(groups)
        ]
    return summaries


def majority_baseline(items: Iterable[Item | FailedItem], score: Scorer, metric: str) -> Baseline | None:
    """What the one answer that is right most often scores on these items; none without a usable item.

    For choices that is the label's share: by text where all items have the same choices, in whatever order,
    else by position. For generated answers it is the reference that the most items have, the first of equals,
    under the task's own scorer, so that partial agreement counts for it as it does for a model.

    Args:
        items: of one task; failed ones are left out.
        score: the task's scorer, for generated answers.
        metric: which of its metrics, for generated answers.
    """
    usable = [item for item in items if not isinstance(item, FailedItem)]
    choice_items = [item for item in usable if isinstance(item, ChoiceItem)]
    if choice_items:
        return _most_frequent_choice(choice_items)
    generation_items = [item for item in usable if isinstance(item, GenerationItem)]
    if not generation_items:
        return None
    answer = _most_common(text for item in generation_items for text in dict.fromkeys(item.references))[0]
    values = [score(item, GenerationAnswer(answer))[metric] for item in generation_items]
    return Baseline(math.fsum(values) / len(values), answer)


@functools.cache
def student_t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with whole degrees of freedom stays below with a probability of 0.5 or more.

    The distribution function is a finite sum for whole degrees of freedom; it is inverted by bisection of the
    angle atan(t / sqrt(degrees)), exact to about 1e-12.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if 0.5 + _central_probability(angle, degrees) / 2 < probability:
            low = angle
        else:
            high = angle
    return math.tan(low) * math.sqrt(degrees)


def student_t_probability(value: float, degrees: int) -> float:
    """That Student's t with whole degrees of freedom stays below `value`."""
    central = _central_probability(math.atan(abs(value) / math.sqrt(degrees)), degrees)
    return 0.5 + math.copysign(central / 2, value)


def _central_probability(angle: float, degrees: int) -> float:
    """That |t| stays below tan(angle) * sqrt(degrees)."""
    is_odd = degrees % 2
    steps = np.arange(1, (degrees - is_odd) // 2)
    ratios = 2 * steps / (2 * steps + 1) if is_odd else (2 * steps - 1) / (2 * steps)
    series = 1.0 + float(np.cumprod(ratios * math.cos(angle) ** 2).sum())
    if not is_odd:
        return math.sin(angle) * series
    # One degree of freedom has the angle alone.
    return 2 / math.pi * (angle + (math.sin(angle) * math.cos(angle) * series if degrees > 1 else 0.0))


def _wilson(share: float, count: int) -> tuple[float, float]:
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    margin = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    # Exact at the ends, where the two terms cancel only up to rounding.
    return (0.0 if share == 0.0 else centre - margin), (1.0 if share == 1.0 else centre + margin)


def _summary(group: Mapping[str, Any], results: Sequence[ItemScores]) -> GroupSummary:
    scored = [result.scores for result in results if result.scores is not None]
    names = scored[0] if scored else ()
    metrics = {name: estimate([scores[name] for scores in scored]) for name in names}
    return GroupSummary(group, len(scored), len(results) - len(scored), metrics)


def _most_frequent_choice(items: Sequence[ChoiceItem]) -> Baseline:
    choices = {tuple(sorted(item.choices)) for item in items}
    if len(choices) == 1:
        answer, count = _most_common(item.choices[item.label].strip() for item in items)
    else:
        answer, count = _most_common(f"choice {item.label + 1}" for item in items)
    return Baseline(count / len(items), answer)


def _most_common(answers: Iterable[str]) -> tuple[str, int]:
    return Counter(answers).most_common(1)[0]
