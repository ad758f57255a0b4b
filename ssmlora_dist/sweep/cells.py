"""What stands in the cells of a report's tables: figures with their intervals, what is missing and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ssmlora_dist.sweep.cases import Case, Measured, Setting, Sweep, is_countable, natural
from ssmlora_dist.sweep.document import NOTHING, Cell
from ssmlora_dist.sweep.rows import PointResult, is_share


def metric_cell(value: float | None, metric: str) -> Cell:
    """A single figure."""
    if value is None:
        return NOTHING
    if not is_countable(value):
        return Cell(str(value), is_bad=True)
    return Cell(percent(value) if is_share(metric) else number(value), value)


def measured_cell(found: Measured | None, metric: str, num_seeds: int) -> Cell:
    """A mean, below it its interval, and how many seeds it is of where those are not all that finished."""
    if found is None:
        return NOTHING
    if is_share(metric):
        text, bounds = percent(found.mean), (f"{100 * found.lower:.1f}", f"{100 * found.upper:.1f}")
    else:
        digits = _decimals((found.mean, found.lower, found.upper))
        text = number(found.mean, digits)
        bounds = (number(found.lower, digits), number(found.upper, digits))
    return Cell(text, found.mean, _interval(found, bounds, num_seeds, metric))


def ratio_cell(found: Measured | None, num_seeds: int) -> Cell:
    """A mean of ratios, in percent."""
    if found is None:
        return NOTHING
    bounds = (f"{100 * found.lower:.1f}", f"{100 * found.upper:.1f}")
    return Cell(percent(found.mean), found.mean, _interval(found, bounds, num_seeds))


def difference_cell(found: Measured | None, metric: str, num_pairs: int) -> Cell:
    """A mean difference with its sign; of scores in percentage points."""
    if found is None:
        return NOTHING
    values = (found.mean, found.lower, found.upper)
    if is_share(metric):
        mean, *bounds = (f"{100 * value:+.1f}" for value in values)
        text = f"{mean} pp"
    else:
        digits = _decimals(values)
        text, *bounds = (number(value, digits, signed=True) for value in values)
    return Cell(text, found.mean, _interval(found, bounds, num_pairs, metric))


def setting_cells(sweep: Sweep, setting: Setting, keys: Iterable[str] | None = None) -> list[Cell]:
    """The values of a setting, under the keys that the sweep shows or others."""
    values = dict(setting)
    return [setting_cell(values.get(key, "")) for key in (sweep.shown_keys if keys is None else keys)]


def setting_cell(text: str) -> Cell:
    """A value of a setting; one that is a number is sorted as one."""
    kind, number_or_parts, _ = natural(text)
    return Cell(text, number_or_parts if kind == 0 else None)


def count_cell(cases: Iterable[Case]) -> Cell:
    """How many of the points finished."""
    points = [point for case in cases for point in case.points]
    finished = sum(point.is_finished for point in points)
    return Cell(f"{finished} of {len(points)}", finished, is_bad=finished < len(points))


def missing_cell(sweep: Sweep, cases: Sequence[Case], notes: Sequence[str] = ()) -> Cell:
    """The points that did not finish, by case and outcome, then `notes`."""
    with_group = len({case.group for case in cases}) > 1
    shared = set.intersection(*(set(case.setting) for case in cases))
    texts = []
    for case in cases:
        shown = [one for one in sweep.shown_setting(case.setting) if one not in shared]
        names = [case.group] * with_group + [f"{key}={value}" for key, value in shown]
        seeds: dict[str, list[str]] = {}
        for point in case.unfinished:
            seeds.setdefault(outcome(point), []).append(str(point.seed))
        for cause, own in seeds.items():
            who = ", ".join([*names, f"seed{'s' * (len(own) > 1)} {', '.join(own)}"])
            texts.append(f"{who}: {cause}")
    text = "; ".join([*texts, *notes])
    return Cell(text, is_bad=bool(text))


def outcome(point: PointResult) -> str:
    """In words."""
    return point.outcome.replace("_", " ")


def percent(share: float) -> str:
    """With one decimal."""
    return f"{100 * share:.1f}%"


def number(value: float, decimals: int | None = None, *, signed: bool = False) -> str:
    """By default four significant digits, and whole numbers in full."""
    sign = "+" if signed else ""
    if 0 < abs(value) < 1e-4 or abs(value) >= 1e15:
        return f"{value:{sign}.4g}"
    return f"{value:{sign},.{_decimals((value,)) if decimals is None else decimals}f}"


def _decimals(values: Sequence[float]) -> int:
    """That give the largest of the values four significant digits; none where all are whole."""
    finite = [value for value in values if math.isfinite(value)]
    if all(value == round(value) for value in finite):
        return 0
    return min(8, max(0, 3 - math.floor(math.log10(max(map(abs, finite))))))


def _interval(found: Measured, bounds: Sequence[str], expected: int, metric: str = "") -> str:
    few = f"{found.count} of {expected} seeds" if found.count != expected else ""
    if found.count == 1:
        return few or "one seed"
    lower, upper = bounds
    if lower != upper:
        interval = f"[{lower}, {upper}]"
    else:
        # Of what no seed decides, such as a number of parameters, there is nothing to say.
        interval = "" if metric.startswith("num_") else "no spread"
    return ", ".join(filter(None, (interval, few)))
