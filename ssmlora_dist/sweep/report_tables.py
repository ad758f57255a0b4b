"""The tables of a sweep's report, apart from how they are written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssmlora_dist.sweep.aggregate import (
    Difference,
    LengthRow,
    by_depth,
    by_input_length,
    by_training_length,
    differences,
    efficiencies,
)
from ssmlora_dist.sweep.cases import SPEED_METRICS, Case, Sweep, is_countable, is_of_before, text_of
from ssmlora_dist.sweep.cells import (
    count_cell,
    difference_cell,
    measured_cell,
    metric_cell,
    missing_cell,
    outcome,
    ratio_cell,
    setting_cell,
    setting_cells,
)
from ssmlora_dist.sweep.document import NOTHING, Cell, Table
from ssmlora_dist.sweep.rows import PointResult

BY_LENGTH_METRICS = ("tokens_per_second", "tokens_per_second_per_device", "peak_memory_gib")
NOT_COUNTED = "not counted"


def not_counted_table(sweep: Sweep) -> Table:
    """What is in no mean, with its reason: points that did not finish, figures that are none, broken rows."""
    rows = []
    for point in sweep.points:
        odd = [f"{name} is {value}" for name, value in point.metrics.items() if not is_countable(value)]
        if not point.is_finished or odd:
            reasons = filter(None, [point.reason, *sorted(odd)])
            rows.append([*_point_cells(sweep, point), Cell("; ".join(reasons))])
    rows += _broken_rows(sweep, 0)
    return Table("What no mean counts, and why", [*_point_columns(sweep), "reason"], rows)


def points_table(sweep: Sweep) -> Table:
    """Every point with its own figures, and the broken rows."""
    rows = [
        [
            *_point_cells(sweep, point),
            Cell(point.reason or ""),
            metric_cell(point.wall_seconds, "wall_seconds"),
            *(metric_cell(point.metrics.get(name), name) for name in sweep.metrics),
        ]
        for point in sweep.points
    ]
    rows += _broken_rows(sweep, 1 + len(sweep.metrics))
    columns = [*_point_columns(sweep), "reason", "wall_seconds", *sweep.metrics]
    return Table("Every point, as its row says", columns, rows)


def _point_columns(sweep: Sweep) -> list[str]:
    return ["point", "group", *sweep.shown_keys, "seed", "outcome"]


def _point_cells(sweep: Sweep, point: PointResult) -> list[Cell]:
    return [
        Cell(point.name),
        Cell(point.group),
        *(setting_cell(text_of(point.overrides, key)) for key in sweep.shown_keys),
        Cell(str(point.seed), point.seed),
        Cell(outcome(point), is_bad=not point.is_finished),
    ]


def _broken_rows(sweep: Sweep, num_behind: int) -> list[list[Cell]]:
    unknown = [NOTHING] * (len(sweep.shown_keys) + 2)
    return [
        [
            Cell(f"line {row.line}"),
            *unknown,
            Cell("broken row", is_bad=True),
            Cell(row.problem),
            *[NOTHING] * num_behind,
        ]
        for row in sweep.broken
    ]


def means_table(sweep: Sweep) -> Table:
    """Losses and scores of every case."""
    metrics = [name for name in sweep.metrics if name not in SPEED_METRICS]
    return _cases_table(sweep, "Losses and scores, mean over the seeds and its 95% interval", metrics)


def speed_table(sweep: Sweep) -> Table:
    """Speed, memory and parameters of every case."""
    metrics = [name for name in sweep.metrics if name in SPEED_METRICS]
    return _cases_table(sweep, "Speed, memory and parameters, mean over the seeds", metrics)


def parameters_table(sweep: Sweep) -> Table:
    """Trainable parameters of every case beside its scores."""
    return _cases_table(sweep, "Trainable parameters and scores", ["num_trainable_parameters", *sweep.scores])


def _cases_table(sweep: Sweep, caption: str, metrics: Sequence[str]) -> Table:
    rows = [
        [
            Cell(case.group),
            *setting_cells(sweep, case.setting),
            count_cell([case]),
            missing_cell(sweep, [case]),
            *(_case_cell(case, name) for name in metrics),
        ]
        for case in sweep.cases
    ]
    return Table(caption, ["group", *sweep.shown_keys, "finished", NOT_COUNTED, *metrics], rows)


def _case_cell(case: Case, metric: str) -> Cell:
    """The mean; where the points that finished have nothing to count, what they have."""
    found = case.measure(metric)
    if found is None:
        own = [point.metrics.get(metric) for point in case.points if point.is_finished]
        return next((metric_cell(value, metric) for value in own if value is not None), NOTHING)
    return measured_cell(found, metric, len(case.seeds))


def differences_tables(sweep: Sweep) -> list[Table]:
    """Every case less the baseline's of the same setting: losses and scores, then speed and memory."""
    metrics = [name for name in sweep.metrics if not is_of_before(name)]
    speed = [name for name in metrics if name in SPEED_METRICS and name != "num_ranks"]
    found = differences(sweep)
    caption = f"to {sweep.baseline}, seed by seed: mean and 95% interval"
    return [
        _differences_table(sweep, found, f"Differences of {what} {caption}", names)
        for what, names in (
            (
                "losses and scores (pp: percentage points)",
                [name for name in metrics if name not in SPEED_METRICS],
            ),
            ("speed and memory", speed),
        )
    ]


def _differences_table(
    sweep: Sweep, found: Sequence[Difference], caption: str, metrics: Sequence[str]
) -> Table:
    rows = []
    for one in found:
        if one.reference is None:
            missing = missing_cell(sweep, [one.case], [f"{sweep.baseline} has no point of this setting"])
        else:
            notes = _without_partner(one.case, one.reference)
            missing = missing_cell(sweep, [one.case, one.reference], notes)
        rows.append(
            [
                Cell(one.case.group),
                *setting_cells(sweep, one.case.setting),
                Cell(str(one.num_pairs), one.num_pairs),
                missing,
                *(difference_cell(one.metrics.get(name), name, one.num_pairs) for name in metrics),
            ]
        )
    return Table(caption, ["group", *sweep.shown_keys, "pairs", NOT_COUNTED, *metrics], rows)


def length_tables(sweep: Sweep) -> list[Table]:
    """Losses and scores by input length, and scores without such parts by training length."""
    tables = [
        _length_table(sweep, by_input_length(sweep, name), f"{name} by input length (tokens)", name)
        for name in sweep.measured_by_length
    ]
    for name in sweep.scores:
        rows = by_training_length(sweep, name)
        if name not in sweep.measured_by_length and any(length for row in rows for length in row.cells):
            tables.append(_length_table(sweep, rows, f"{name} by training length (tokens)", name))
    return tables


def speed_by_length_tables(sweep: Sweep) -> list[Table]:
    """Tokens per second and peak memory by training length; none where no point sets one."""
    if all(case.length is None for case in sweep.cases):
        return []
    return [
        _length_table(sweep, by_training_length(sweep, name), f"{name} by training length (tokens)", name)
        for name in BY_LENGTH_METRICS
        if name in sweep.metrics
    ]


def depth_tables(sweep: Sweep) -> list[Table]:
    """Scores of tasks by depth of the fact, a column for each input length."""
    tables = []
    for name in sweep.measured_by_length:
        rows = by_depth(sweep, name)
        depths = sorted({depth for row in rows for _, depth in row.cells})
        lengths = sorted({length for row in rows for length, _ in row.cells})
        keys = _keys_of(sweep, rows)
        lines = [
            [
                Cell(row.group),
                *setting_cells(sweep, row.setting, keys),
                Cell(f"{depth:.0%}", depth),
                count_cell(row.cases),
                missing_cell(sweep, row.cases),
                *(measured_cell(row.cells.get((length, depth)), name, _num_seeds(row)) for length in lengths),
            ]
            for row in rows
            for depth in depths
        ]
        if lines:
            columns = ["group", *keys, "depth", "finished", NOT_COUNTED, *(f"{n:,}" for n in lengths)]
            caption = f"{name} by depth of the fact and input length (tokens)"
            tables.append(Table(caption, columns, lines))
    return tables


def efficiency_table(sweep: Sweep) -> Table:
    """Tokens per second and device of every topology, relative to the smallest."""
    name = "tokens_per_second_per_device"
    rows = []
    for found in efficiencies(sweep):
        devices = NOTHING if found.num_devices is None else Cell(str(found.num_devices), found.num_devices)
        count = len(found.case.seeds)
        relative = ratio_cell(found.relative, count)
        if found.is_reference:
            relative = Cell(relative.text, relative.value, "the smallest")
        rows.append(
            [
                Cell(found.workload),
                Cell(found.topology),
                devices,
                count_cell([found.case]),
                missing_cell(sweep, [found.case]),
                measured_cell(found.case.measure(name), name, count),
                relative,
            ]
        )
    columns = ["workload", "topology", "devices", "finished", NOT_COUNTED, name, "relative"]
    caption = "Tokens per second and device, relative to the smallest topology that finished, seed by seed"
    return Table(caption, columns, rows)


def _length_table(sweep: Sweep, rows: Sequence[LengthRow[Any]], caption: str, metric: str) -> Table:
    lengths = sorted({length for row in rows for length in row.cells}, key=lambda length: length or 0)
    keys = _keys_of(sweep, rows)
    lines = [
        [
            Cell(row.group),
            *setting_cells(sweep, row.setting, keys),
            count_cell(row.cases),
            missing_cell(sweep, row.cases),
            *(measured_cell(row.cells.get(length), metric, _num_seeds(row)) for length in lengths),
        ]
        for row in rows
    ]
    shown = ["as base" if length is None else f"{length:,}" for length in lengths]
    return Table(caption, ["group", *keys, "finished", NOT_COUNTED, *shown], lines)


def _keys_of(sweep: Sweep, rows: Sequence[LengthRow[Any]]) -> list[str]:
    """The shown keys that any of the rows has: those that differ in their length alone lack it."""
    known = {key for row in rows for key, _ in row.setting}
    return [key for key in sweep.shown_keys if key in known]


def _num_seeds(row: LengthRow[Any]) -> int:
    return max(len(case.seeds) for case in row.cases)


def _without_partner(case: Case, reference: Case) -> list[str]:
    """Seeds that only one of two cases has a point of."""
    notes = []
    for one, other in ((case, reference), (reference, case)):
        seeds = {point.seed for point in one.points} - {point.seed for point in other.points}
        notes += [f"seed {seed}: no point of {other.group}" for seed in sorted(seeds)]
    return notes
