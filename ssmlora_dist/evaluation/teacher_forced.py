"""Loss and teacher-forced exact match, by input length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Means over a group of examples.

    Attributes:
        num_examples: size of the group.
        loss: mean cross-entropy per target token, in nats.
        exact_match: share of examples whose scored tokens were all the arg-max, given the true tokens before.
    """

    num_examples: int
    loss: float
    exact_match: float


@dataclass(frozen=True)
class ExampleScore:
    """What one example scored; `length` names its group."""

    length: str
    loss_sum: float
    num_targets: int
    exact: bool


OVERALL = "all"


def summarize(
    scores: Sequence[ExampleScore],
    groups: Sequence[str],
    sum_over_ranks: Callable[[Sequence[float]], list[float]] = lambda values: list(values),
) -> dict[str, Score]:
    """Scores by group in the order of `groups`, then `all`.

    Args:
        scores: this rank's examples, each on exactly one rank.
        groups: every group of the whole data set, the same on all ranks.
        sum_over_ranks: adds values up over the ranks.
    """
    table = {group: [0.0, 0.0, 0.0, 0.0] for group in (*groups, OVERALL)}
    for score in scores:
        for group in (score.length, OVERALL):
            row = table[group]
            for column, value in enumerate(
                (1.0, score.loss_sum, float(score.num_targets), float(score.exact))
            ):
                row[column] += value
    flat = sum_over_ranks([value for row in table.values() for value in row])
    summed = {group: flat[4 * i : 4 * i + 4] for i, group in enumerate(table)}
    return {
        group: Score(int(count), loss / targets, exact / count)
        for group, (count, loss, targets, exact) in summed.items()
        if count
    }
