"""Every point is in every table, or named there with its reason."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from ssmlora_dist.sweep import report_tables as tables
from ssmlora_dist.sweep.cases import Measured, Sweep, ordered_sweep
from ssmlora_dist.sweep.cells import difference_cell, measured_cell, metric_cell, number, ratio_cell
from ssmlora_dist.sweep.document import Cell, Table
from ssmlora_dist.sweep.rows import BrokenRow
from tests.sweep.results import REASON, full_sweep, lost, result, sweep_of


def texts(table: Table, *columns: str) -> list[list[str]]:
    indices = [list(table.columns).index(column) for column in columns]
    return [[row[index].text for index in indices] for row in table.rows]


def all_tables(sweep: Sweep) -> Sequence[Table]:
    return [
        tables.not_counted_table(sweep),
        tables.points_table(sweep),
        tables.means_table(sweep),
        tables.speed_table(sweep),
        *tables.differences_tables(sweep),
        *tables.length_tables(sweep),
        *tables.depth_tables(sweep),
        *tables.speed_by_length_tables(sweep),
        tables.parameters_table(sweep),
        tables.efficiency_table(sweep),
    ]


@pytest.mark.parametrize("outcome", ["failed", "out_of_memory", "stopped", "not_run"])
@pytest.mark.parametrize("method", ["lora", "ssmlora"])
def test_what_did_not_finish_is_in_every_table(outcome: str, method: str) -> None:
    overrides = {"data.max_length": 256, "launcher.ranks": 1}
    missing = lost(method, 7, outcome, overrides=overrides, reason="the reason")
    found = all_tables(sweep_of(*full_sweep(), missing, baseline="lora"))
    assert len(found) == 14
    assert all(any("the reason" in cell.text for row in table.rows for cell in row) for table in found[:2])
    for table in found:
        content = [f"{cell.text}" for row in table.rows for cell in row]
        assert any(outcome.replace("_", " ") in text for text in content), table.caption
        assert all(len(row) == len(table.columns) for row in table.rows), table.caption


def test_every_case_has_a_line_even_if_nothing_of_it_finished() -> None:
    table = tables.means_table(sweep_of(*full_sweep()))
    assert texts(
        table, "group", "data.max_length", "launcher.ranks", "finished", "not counted", "final_loss"
    )[:4] == [
        ["lora", "256", "1", "3 of 3", "", "2.010"],
        ["lora", "256", "2", "3 of 3", "", "2.010"],
        ["lora", "1024", "1", "0 of 3", "seeds 0, 1, 2: out of memory", ""],
        ["lora", "1024", "2", "3 of 3", "", "2.010"],
    ]
    assert len(table.rows) == 8


def test_points_and_broken_rows() -> None:
    points = [result("lora", 0, {"final_loss": 2.5, "task/keys": 0.375}, wall_seconds=61.5), lost("lora", 1)]
    sweep = ordered_sweep("trial", points, [BrokenRow(5, "no JSON")])
    not_counted = tables.not_counted_table(sweep)
    assert texts(not_counted, *not_counted.columns) == [
        ["lora-seed1", "lora", "1", "out of memory", REASON],
        ["line 5", "", "", "broken row", "no JSON"],
    ]
    table = tables.points_table(sweep)
    assert texts(table, *table.columns) == [
        ["lora-seed0", "lora", "0", "finished", "", "61.50", "2.500", "37.5%"],
        ["lora-seed1", "lora", "1", "out of memory", REASON, "", "", ""],
        ["line 5", "", "", "broken row", "no JSON", "", "", ""],
    ]


def test_differences() -> None:
    sweep = sweep_of(
        *(
            result(
                group, seed, {"final_loss": loss + seed, "task/keys": loss / 10, "validation_loss_before": 9}
            )
            for group, loss in (("base", 2.0), ("ours", 1.5))
            for seed in (0, 1)
        ),
        lost("base", 2),
        result("ours", 2),
        result("ours", 3),
        result("ours", 0, {"final_loss": 1.0}, {"adapter.rank": 4}),
        baseline="base",
    )
    table, speed = tables.differences_tables(sweep)
    assert list(speed.columns) == ["group", "adapter.rank", "pairs", "not counted"]
    assert texts(table, *table.columns) == [
        ["ours", "4", "0", "base has no point of this setting", "", ""],
        [
            "ours",
            "as base",
            "2",
            "base, seed 2: out of memory; seed 3: no point of base",
            "-0.5000",
            "-5.0 pp",
        ],
    ]


def test_tables_by_length() -> None:
    sweep = sweep_of(*full_sweep())
    by_input, by_training = tables.length_tables(sweep)
    assert by_input.caption == "task/keys by input length (tokens)"
    assert texts(by_input, "group", "launcher.ranks", "finished", "256", "1,024") == [
        ["lora", "1", "3 of 6", "62.0%", ""],
        ["lora", "2", "6 of 6", "62.0%", "62.0%"],
        ["ssmlora", "1", "6 of 6", "72.0%", "72.0%"],
        ["ssmlora", "2", "6 of 6", "72.0%", "72.0%"],
    ]
    assert texts(by_input, "not counted")[0] == ["data.max_length=1024, seeds 0, 1, 2: out of memory"]
    assert by_training.caption == "validation_exact_match_after by training length (tokens)"
    speed = tables.speed_by_length_tables(sweep)[0]
    assert texts(speed, "256", "1,024") == [
        ["935.0", ""],
        ["1,670", "1,286"],
        ["935.0", "743.0"],
        ["1,670", "1,286"],
    ]


def test_no_speed_by_length_where_no_point_sets_one() -> None:
    sweep = sweep_of(result("lora", 0, {"tokens_per_second": 1000.0}))
    assert tables.speed_by_length_tables(sweep) == []


def test_table_by_depth() -> None:
    [table] = tables.depth_tables(sweep_of(*full_sweep()))
    assert texts(table, "group", "launcher.ranks", "depth", "256", "1,024")[:4] == [
        ["lora", "1", "0%", "70.0%", ""],
        ["lora", "1", "50%", "50.0%", ""],
        ["lora", "2", "0%", "70.0%", "70.0%"],
        ["lora", "2", "50%", "50.0%", "50.0%"],
    ]


def test_efficiency() -> None:
    table = tables.efficiency_table(sweep_of(*full_sweep()))
    assert texts(table, "workload", "topology", "devices", "relative")[:4] == [
        ["lora, max_length=256", "ranks=1", "1", "100.0%"],
        ["lora, max_length=256", "ranks=2", "2", "89.3%"],
        ["lora, max_length=1024", "ranks=1", "", ""],
        ["lora, max_length=1024", "ranks=2", "2", "100.0%"],
    ]
    assert table.rows[0][-1].detail == "the smallest"


INF = float("inf")


@pytest.mark.parametrize(
    ("cell", "text", "detail"),
    [
        (measured_cell(Measured(2.5, 2.25, 2.75, 3), "final_loss", 3), "2.500", "[2.250, 2.750]"),
        (
            measured_cell(Measured(2.5, 2.25, 2.75, 2), "final_loss", 3),
            "2.500",
            "[2.250, 2.750], 2 of 3 seeds",
        ),
        (measured_cell(Measured(2.5, -INF, INF, 1), "final_loss", 1), "2.500", "one seed"),
        (measured_cell(Measured(2.5, -INF, INF, 1), "final_loss", 3), "2.500", "1 of 3 seeds"),
        (measured_cell(Measured(2.5, 2.5, 2.5, 3), "final_loss", 3), "2.500", "no spread"),
        (difference_cell(Measured(0.1, 0.1 - 1e-16, 0.1 + 1e-16, 3), "x", 3), "+0.1000", "no spread"),
        (measured_cell(Measured(0.5, 0.25, 1.0, 3), "task/keys", 3), "50.0%", "[25.0, 100.0]"),
        (measured_cell(Measured(4096, 4096, 4096, 3), "num_trainable_parameters", 3), "4,096", ""),
        (measured_cell(Measured(19495, 19367.4, 19622.6, 3), "x", 3), "19,495", "[19,367, 19,623]"),
        (measured_cell(Measured(8.3, -445.8, 462.4, 3), "x", 3), "8.3", "[-445.8, 462.4]"),
        (difference_cell(Measured(0.05, -0.01, 0.11, 3), "task/keys", 3), "+5.0 pp", "[-1.0, +11.0]"),
        (difference_cell(Measured(-2.0, -3.5, -0.5, 3), "x", 3), "-2.000", "[-3.500, -0.500]"),
        (ratio_cell(Measured(1.1, 0.9, 1.3, 3), 3), "110.0%", "[90.0, 130.0]"),
    ],
)
def test_cells(cell: Cell, text: str, detail: str) -> None:
    assert (cell.text, cell.detail) == (text, detail)


def test_a_figure_that_is_not_finite_is_shown_and_not_sorted_by() -> None:
    assert metric_cell(float("nan"), "final_loss") == Cell("nan", is_bad=True)
    assert metric_cell(1e200, "final_loss") == Cell("1e+200", is_bad=True)


def test_figures_that_are_none_are_named() -> None:
    points = [result("lora", seed, {"a": math.nan, "b": value}) for seed, value in ((0, 1.0), (1, math.inf))]
    sweep = sweep_of(*points, result("other", 0, {"a": 1.0, "b": 1.0}), baseline="lora")
    table = tables.means_table(sweep)
    assert [[(cell.text, cell.detail) for cell in row[-2:]] for row in table.rows] == [
        [("nan", ""), ("1", "1 of 2 seeds")],
        [("1", "one seed"), ("1", "one seed")],
    ]
    assert texts(tables.not_counted_table(sweep), "point", "outcome", "reason") == [
        ["lora-seed0", "finished", "a is nan"],
        ["lora-seed1", "finished", "a is nan; b is inf"],
    ]


def test_points_that_repeat_a_seed_count_once() -> None:
    points = [result("lora", 0, {"a": value}, name=f"run {value}") for value in (1.0, 2.0)]
    [row] = tables.means_table(sweep_of(*points)).rows
    assert [(cell.text, cell.detail) for cell in row] == [
        ("lora", ""),
        ("2 of 2", ""),
        ("", ""),
        ("1.500", "one seed"),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (2, "2"), (0.0001234, "0.0001234"), (1.5e-7, "1.5e-07"), (1234.5, "1,234"), (3e20, "3e+20")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
