"""The tables of a sweep's report, apart from how they are written down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssmlora_dist.sweep.aggregate import (
    LengthRow,
    by_depth,
    by_input_length,
    by_training_length,
    differences,
    efficiencies,
)
from ssmlora_dist.sweep.cases import SPEED_METRICS, Case, Sweep, is_of_before, text_of
from ssmlora_dist.sweep.cells import (
    NOTHING,
    Cell,
    Table,
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

BY_LENGTH_METRICS = ("tokens_per_second", "tokens_per_second_per_device", "peak_memory_gib")
NOT_COUNTED = "not counted"


def points_table(sweep: Sweep) -> Table:
    """Every point with its own figures, and the broken rows."""
    keys = sweep.shown_keys
    columns = ["point", "group", *keys, "seed", "outcome", "reason", "wall_seconds", *sweep.metrics]
    rows = []
    for point in sweep.points:
        wall = NOTHING if point.wall_seconds is None else metric_cell(point.wall_seconds, "wall_seconds")
        rows.append(
            [
                Cell(point.name),
                Cell(point.group),
                *(setting_cell(text_of(point.overrides, key)) for key in keys),
                Cell(str(point.seed), point.seed),
                Cell(outcome(point), is_bad=not point.is_finished),
                Cell(point.reason or ""),
                wall,
                *(metric_cell(point.metrics.get(name), name) for name in sweep.metrics),
            ]
        )
    empty = [NOTHING] * len(keys)
    for row in sweep.broken:
        start = [Cell(f"line {row.line}"), NOTHING, *empty, NOTHING, Cell("broken row", is_bad=True)]
        rows.append([*start, Cell(row.problem), *[NOTHING] * (len(columns) - len(start) - 1)])
    return Table("Every point, as its row says", columns, rows)


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
            *(measured_cell(case.measure(name), name, case.num_finished) for name in metrics),
        ]
        for case in sweep.cases
    ]
    return Table(caption, ["group", *sweep.shown_keys, "finished", NOT_COUNTED, *metrics], rows)


def differences_table(sweep: Sweep) -> Table:
    """Every case less the baseline's of the same setting."""
    metrics = [name for name in sweep.metrics if not is_of_before(name)]
    rows = []
    for difference in differences(sweep):
        case, reference = difference.case, difference.reference
        pairs = max((found.count for found in difference.metrics.values()), default=0)
        cells = [difference_cell(difference.metrics.get(name), name, pairs) for name in metrics]
        if reference is None:
            missing = missing_cell(sweep, [case], [f"{sweep.baseline} has no point of this setting"])
        else:
            missing = missing_cell(sweep, [case, reference], _without_partner(case, reference))
        rows.append(
            [
                Cell(case.group),
                *setting_cells(sweep, case.setting),
                Cell(str(pairs), pairs),
                missing,
                *cells,
            ]
        )
    caption = f"Differences to {sweep.baseline}, seed by seed: mean and 95% interval; pp: percentage points"
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
                *(
                    measured_cell(row.cells.get((length, depth)), name, _num_finished(row))
                    for length in lengths
                ),
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
        count = found.case.num_finished
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
            *(measured_cell(row.cells.get(length), metric, _num_finished(row)) for length in lengths),
        ]
        for row in rows
    ]
    shown = ["as base" if length is None else f"{length:,}" for length in lengths]
    return Table(caption, ["group", *keys, "finished", NOT_COUNTED, *shown], lines)


def _keys_of(sweep: Sweep, rows: Sequence[LengthRow[Any]]) -> list[str]:
    """The shown keys that any of the rows has: those that differ in their length alone lack it."""
    known = {key for row in rows for key, _ in row.setting}
    return [key for key in sweep.shown_keys if key in known]


def _num_finished(row: LengthRow[Any]) -> int:
    return max(case.num_finished for case in row.cases)


def _without_partner(case: Case, reference: Case) -> list[str]:
    """Seeds that only one of two cases has a point of."""
    notes = []
    for one, other in ((case, reference), (reference, case)):
        seeds = {point.seed for point in one.points} - {point.seed for point in other.points}
        notes += [f"seed {seed}: no point of {other.group}" for seed in sorted(seeds)]
    return notes
