"""The accuracy study: which runs there are, in which order, and what rows keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import plan
from benchmarks.accuracy.decisions import CONTROLS, OTHERS
from benchmarks.accuracy.plan import FINAL_SEEDS, METHODS, START_RATES, TUNING_SEEDS, Run, Setting
from benchmarks.accuracy.rows import append_rows, read_rows
from benchmarks.accuracy.training import num_trained, order
from ssmlora_dist.errors import DataError
from ssmlora_dist.models.configuration import load_config
from ssmlora_dist.models.structure import empty_model
from tests.benchmarks.made_up import row, run_rows

SETTING = Setting("model", 20, 144, steps=40, batch=2, num_train=160, num_validation=30, num_test=48)
CELL = ("prose", 144, "paper")
# The adapted layers of SmolLM2-135M.
SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def finish(loss_of: Callable[[Run], float | None], cells: list[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """The rows of a whole study, of which every run has the loss that is asked for."""
    rows: list[dict[str, Any]] = []
    while runs := plan.next_runs(rows, cells):
        for run in runs:
            settings = {key: getattr(run, key) for key in ("phase", "length", "method", "rate", "seed")}
            rows += run_rows(run.task_set, loss=loss_of(run), **settings)
    return rows


def test_a_pair_shares_seed_and_texts() -> None:
    for task_set in ("generated", "prose"):
        runs = [
            Run("final", task_set, 144, method, rate, 201)
            for method, rate in (("lora", 0.01), ("paper", 0.005), ("probe", 0.02))
        ]
        orders = [order(run, SETTING) for run in runs]
        assert orders[0] == orders[1] == orders[2]
        for chosen in orders[0]:
            assert len(set(chosen)) == len(chosen) == 80 // len(orders[0])
        other = Run("final", task_set, 144, "lora", 0.01, 202)
        assert order(other, SETTING) != orders[0]


def test_final_seeds_are_not_those_of_tuning() -> None:
    assert len(set(FINAL_SEEDS)) == 8
    assert not set(FINAL_SEEDS) & set(TUNING_SEEDS)


def test_a_baseline_has_at_least_its_rivals_parameters() -> None:
    model = empty_model(load_config(config=SHAPE))
    counts = {name: num_trained(model, config) for name, config in METHODS.items() if config is not None}
    assert counts["lora"] == counts["lora_dense"] == 153_600
    assert counts["lora_dense_equal_rank"] == 2 * counts["lora"]
    assert counts["paper"] <= counts["lora"]
    assert all(counts[control] >= counts["paper"] for control in CONTROLS)
    assert all(counts[other] >= counts["gated"] for other in OTHERS if METHODS[other] is not None)


def test_rates_are_tuned_first_and_the_best_one_is_run_with_the_final_seeds() -> None:
    runs = plan.next_runs([], [CELL])
    assert {(run.phase, run.rate, run.seed) for run in runs} == {
        ("tuning", rate, seed) for rate in START_RATES for seed in TUNING_SEEDS
    }
    best = START_RATES[1]
    rows = finish(lambda run: abs(run.rate - best), [CELL])
    final = [each for each in rows if each["phase"] == "final"]
    assert [each["seed"] for each in final] == list(FINAL_SEEDS)
    assert {each["rate"] for each in final} == {best}
    assert len(rows) == len(START_RATES) * len(TUNING_SEEDS) + len(FINAL_SEEDS)
    assert plan.num_runs_left(rows, [CELL]) == 0
    assert plan.num_runs_left([], [CELL]) == len(rows)


@pytest.mark.parametrize("target", [START_RATES[0] / 4, START_RATES[-1] * 4])
def test_the_grid_grows_until_the_best_rate_is_inside(target: float) -> None:
    rows = finish(lambda run: abs(run.rate - target), [CELL])
    tuned = sorted({each["rate"] for each in rows if each["phase"] == "tuning"})
    final = {each["rate"] for each in rows if each["phase"] == "final"}
    assert final == {target}
    assert tuned[0] < target < tuned[-1]
    assert {high / low for low, high in itertools.pairwise(tuned)} == {2.0}


def test_a_grid_grows_by_the_mean_of_both_seeds_and_not_by_the_first_that_is_done() -> None:
    """One run at a time, as workers end: the first seed alone has its best rate at the edge."""
    best = {TUNING_SEEDS[0]: START_RATES[0], TUNING_SEEDS[1]: START_RATES[2]}

    def loss_of(run: Run) -> float:
        weight = 1.0 if run.seed == TUNING_SEEDS[0] else 10.0
        return weight * abs(math.log2(run.rate / best.get(run.seed, run.rate)))

    rows: list[dict[str, Any]] = []
    while runs := plan.next_runs(rows, [CELL]):
        settings = {key: getattr(runs[0], key) for key in ("phase", "length", "method", "rate", "seed")}
        rows += run_rows(runs[0].task_set, loss=loss_of(runs[0]), **settings)
    assert {each["rate"] for each in rows if each["phase"] == "tuning"} == set(START_RATES)
    assert {each["rate"] for each in rows if each["phase"] == "final"} == {START_RATES[2]}


def test_the_grid_ends_somewhere() -> None:
    rows = finish(lambda run: run.rate, [CELL])
    assert len({each["rate"] for each in rows if each["phase"] == "tuning"}) == plan.MOST_RATES


def test_a_rate_that_diverged_once_is_not_the_best() -> None:
    """One of the two seeds of the third rate has no loss; the other would be the least of all."""

    def loss_of(run: Run) -> float | None:
        if run.rate == START_RATES[2]:
            return None if run.seed == TUNING_SEEDS[1] else 0.0
        return abs(run.rate - START_RATES[1])

    rows = finish(loss_of, [CELL])
    assert {each["rate"] for each in rows if each["phase"] == "final"} == {START_RATES[1]}


def test_final_seeds_are_run_one_after_the_other_for_all_methods() -> None:
    cells = [("prose", 144, method) for method in ("lora", "paper")]
    tuning = [
        each
        for each in finish(lambda run: abs(run.rate - START_RATES[1]), cells)
        if each["phase"] == "tuning"
    ]
    runs = plan.next_runs(tuning, cells)
    assert [(run.seed, run.method) for run in runs[:3]] == [(201, "lora"), (201, "paper"), (202, "lora")]


def test_a_run_without_the_rows_of_all_its_tasks_is_run_again(tmp_path: Path) -> None:
    cell = ("generated", 144, "lora")
    first, *others = plan.next_runs([], [cell])
    settings = {"phase": "tuning", "method": "lora", "rate": first.rate, "seed": first.seed}
    both = run_rows("generated", **settings)
    assert plan.next_runs(both, [cell]) == others
    assert first in plan.next_runs(both[:1], [cell])


def test_rows_that_are_there_are_skipped_and_a_half_written_line_is_dropped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results" / "rows.jsonl"
    assert read_rows(path) == []
    first, second = (row(phase="tuning", task="prose", seed=seed) for seed in TUNING_SEEDS)
    append_rows(path, [first])
    with path.open("a") as file:
        file.write('{"task": "prose", "lo')
    assert read_rows(path) == [first]
    assert f"{path}:2: half-written" in capsys.readouterr().err
    append_rows(path, [second])
    assert read_rows(path) == [first, second]
    assert capsys.readouterr().err == ""


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"loss": 1}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: is no row of the study"):
        read_rows(path)


def test_rows_of_other_sizes_are_refused(tmp_path: Path) -> None:
    made = row(setting={**vars(SETTING), "steps": 20})
    with pytest.raises(DataError, match=r"rows.jsonl:1: was made with steps 20 \(now 40\)"):
        plan.check_settings([made], [SETTING], tmp_path / "rows.jsonl")
