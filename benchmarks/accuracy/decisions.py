"""What the rows say: paired differences, their intervals, and the hypotheses by the rules of README.md.

The unit is a pair: two methods with one seed, hence one order of one set of texts, one start and one set of
test texts, each at its own tuned rate; its difference is the mean over the tasks. Differences count in favour
of the first method: nats lower, or points (percent of scored tokens) higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.accuracy.plan import FINAL_SEEDS, Row
from ssmlora_dist.evaluation.statistics import student_t_probability, student_t_quantile

Measure = Literal["nats", "points"]
LEVEL = 0.05
POWER = 0.8
NUM_BOOTSTRAP = 2000
# H1: at most this much worse, in points, is not worse.
MARGIN_POINTS = 0.5
CONTROLS = ("paper_no_carry", "constant", "rolled")
# H1 to H4 and H6 are decided by their mean.
DECIDING_TASKS = ("needles", "tracking", "prose")
# H5: over lengths.
GROWING_TASKS = ("needles", "tracking")
# H4: all methods of about its parameters.
OTHERS = ("lora", "lora_dense", "paper", *CONTROLS, "probe")


@dataclass(frozen=True)
class Comparison:
    """A difference over pairs.

    Attributes:
        name: what is compared.
        measure: its unit.
        differences: one a seed.
        margin: the difference under the null hypothesis: 0, or less where it is to be shown to be no worse.
        bootstrap: 95% interval by resampling seeds and texts; None without texts.
    """

    name: str
    measure: Measure | str
    differences: tuple[float, ...]
    margin: float = 0.0
    bootstrap: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Over the pairs."""
        return math.fsum(self.differences) / len(self.differences)

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        squares = math.fsum((value - self.mean) ** 2 for value in self.differences)
        return math.sqrt(squares / (self._degrees * len(self.differences)))

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided, 95%."""
        half = student_t_quantile(1 - LEVEL / 2, self._degrees) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def lower(self) -> float:
        """Lower end of the one-sided 95% interval."""
        return self.mean - student_t_quantile(1 - LEVEL, self._degrees) * self.standard_error

    @property
    def p(self) -> float:
        """One-sided: of a mean as large as this one, were the true one at the margin."""
        if self.standard_error == 0.0:
            return 0.0 if self.mean > self.margin else 1.0
        return 1 - student_t_probability((self.mean - self.margin) / self.standard_error, self._degrees)

    @property
    def detectable(self) -> float:
        """Above the margin, what so many pairs of this spread find 8 times of 10, by the one-sided test."""
        quantiles = (student_t_quantile(share, self._degrees) for share in (1 - LEVEL, POWER))
        return math.fsum(quantiles) * self.standard_error

    @property
    def _degrees(self) -> int:
        return len(self.differences) - 1


@dataclass(frozen=True)
class Decision:
    """What becomes of a hypothesis.

    Attributes:
        name: H1 to H6.
        parts: comparisons that must all hold; none where it was not run.
        p: the largest of theirs; 1 where it was not run.
        adjusted_p: after Holm over all six.
    """

    name: str
    parts: tuple[Comparison, ...]
    p: float
    adjusted_p: float

    @property
    def verdict(self) -> str:
        """By the rules of README.md; what rests on fewer pairs than planned says so."""
        if not self.parts:
            return "not run"
        pairs = min(len(part.differences) for part in self.parts)
        interim = f" (on {pairs} of {len(FINAL_SEEDS)} pairs)" if pairs < len(FINAL_SEEDS) else ""
        return self._ruling + interim

    @property
    def _ruling(self) -> str:
        if self.adjusted_p <= LEVEL:
            return "holds"
        if self.p <= LEVEL:
            return "holds by itself, not after Holm"
        if any(part.interval[1] < part.margin for part in self.parts):
            return "refuted"
        return "not decided"


Cells = Mapping[tuple[str, str, int], Mapping[int, Row]]
"""Final rows by method, task and length, and by seed."""


def cells(rows: Iterable[Row]) -> Cells:
    """The final rows of the study."""
    found: dict[tuple[str, str, int], dict[int, Row]] = {}
    for row in rows:
        if row["phase"] == "final":
            found.setdefault((row["method"], row["task"], row["length"]), {})[row["seed"]] = row
    return found


def value(row: Row, measure: Measure) -> float:
    """Larger is better; a run that has diverged has lost by any measure."""
    if row["loss"] is None:
        return -math.inf
    return -float(row["loss"]) if measure == "nats" else 100 * float(row["accuracy"])


def compare(
    cells: Cells,
    first: str,
    second: str,
    tasks: Sequence[str],
    length: int,
    measure: Measure,
    margin: float = 0.0,
) -> Comparison | None:
    """`first` minus `second`, mean over the tasks; None with fewer than two seeds that have all of it."""
    ours, theirs = ([cells.get((name, task, length), {}) for task in tasks] for name in (first, second))
    seeds = sorted(set.intersection(*map(set, (*ours, *theirs)))) if tasks else []
    pairs = [[(mine[seed], other[seed]) for mine, other in zip(ours, theirs, strict=True)] for seed in seeds]
    # A difference to what has diverged is no number; the table counts these runs.
    pairs = [pair for pair in pairs if all(row["loss"] is not None for both in pair for row in both)]
    if len(pairs) < 2:
        return None
    differences = tuple(
        math.fsum(value(mine, measure) - value(other, measure) for mine, other in pair) / len(pair)
        for pair in pairs
    )
    return Comparison(f"{first} - {second}", measure, differences, margin, _bootstrap(pairs, measure))


def _bootstrap(pairs: Sequence[Sequence[tuple[Row, Row]]], measure: Measure) -> tuple[float, float] | None:
    """Resamples seeds, and texts of each task, the same ones for both methods and all seeds."""
    if not all("texts" in row for pair in pairs for both in pair for row in both):
        return None
    generator = np.random.default_rng(0)
    key, scale = ("losses", -1.0) if measure == "nats" else ("correct", 100.0)
    seeds = generator.integers(len(pairs), size=(NUM_BOOTSTRAP, len(pairs)))
    drawn = np.zeros(NUM_BOOTSTRAP)
    num_tasks = len(pairs[0])
    for task in range(num_tasks):
        rows = [pair[task] for pair in pairs]
        targets = np.array(rows[0][0]["texts"]["targets"], dtype=float)
        gains = np.array(
            [np.subtract(*(np.array(row["texts"][key], dtype=float) for row in both)) for both in rows]
        )
        texts = generator.integers(len(targets), size=(NUM_BOOTSTRAP, len(targets)))
        of_seeds = gains[seeds[:, :, None], texts[:, None, :]].sum(2).mean(1)
        drawn += scale * of_seeds / targets[texts].sum(1) / num_tasks
    low, high = np.quantile(drawn, (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def growth(
    cells: Cells, first: str, second: str, tasks: Sequence[str], lengths: Sequence[int]
) -> Comparison | None:
    """How much the difference grows when the length doubles: the least-squares slope of every seed."""
    by_length: dict[int, dict[int, float]] = {}
    for length in lengths:
        sides = [cells.get((name, task, length), {}) for name in (first, second) for task in tasks]
        for seed in set.intersection(*map(set, sides)):
            values = [value(side[seed], "nats") for side in sides]
            if all(map(math.isfinite, values)):
                gain = math.fsum(values[: len(tasks)]) - math.fsum(values[len(tasks) :])
                by_length.setdefault(length, {})[seed] = gain / len(tasks)
    if len(by_length) < 2:
        return None
    seeds = sorted(set.intersection(*map(set, by_length.values())))
    if len(seeds) < 2:
        return None
    logs = np.log2(sorted(by_length))
    slopes = [
        float(np.polyfit(logs, [by_length[length][seed] for length in sorted(by_length)], 1)[0])
        for seed in seeds
    ]
    return Comparison(f"{first} - {second}, a doubling", "nats", tuple(slopes))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that under `LEVEL` any false one among them is as rare as that."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def decide(rows: Iterable[Row], length: int) -> list[Decision]:
    """H1 to H4 and H6 at one length, H5 over all lengths of the generated tasks.

    Args:
        rows: of the study.
        length: of the texts.
    """
    found = cells(rows)
    lengths = sorted({size for _, task, size in found if task in GROWING_TASKS})

    def better(
        first: str, *others: str, measure: Measure = "nats", margin: float = 0.0
    ) -> list[Comparison | None]:
        return [compare(found, first, other, DECIDING_TASKS, length, measure, margin) for other in others]

    parts = {
        "H1": better("lora", "lora_dense", "lora_dense_equal_rank", measure="points", margin=-MARGIN_POINTS),
        "H2": better("paper", "lora"),
        "H3": better("paper", *CONTROLS),
        "H4": better("gated", *OTHERS),
        "H5": [growth(found, "paper", "lora", GROWING_TASKS, lengths)],
        "H6": better("probe", "lora"),
    }
    complete = {
        name: tuple(part for part in each if part is not None) if None not in each else ()
        for name, each in parts.items()
    }
    p_values = [max((part.p for part in each), default=1.0) for each in complete.values()]
    return [
        Decision(name, each, p, adjusted)
        for (name, each), p, adjusted in zip(complete.items(), p_values, holm(p_values), strict=True)
    ]
