"""What is run, in which order, and how often: pure functions of the rows that exist already.

A run trains one method once, on one task set, and leaves a row for each task of the set. A cell is what has
one rate: task set, length and method. In every cell the rates are tuned first, on validation texts with seeds
of their own; the rate that is best there, which must have worse neighbours on both sides, is run with the
final seeds, which were never seen before, on test texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
RESULTS = ROOT / "benchmarks" / "results"
CACHE = ROOT / "runs" / "accuracy_cache"

Phase = Literal["tuning", "final"]
SPLITS: Mapping[str, str] = {"tuning": "validation", "final": "test"}
TASK_SETS: Mapping[str, tuple[str, ...]] = {
    "generated": ("needles", "tracking"),
    "prose": ("prose",),
    "babi": ("qa2", "qa3"),
}

TUNING_SEEDS = (101, 102)
FINAL_SEEDS = tuple(range(201, 209))
# Powers of 2 from here on: exact in floating point, so that a rate can be a key.
LEAST_RATE = 0.00125
START_RATES = tuple(LEAST_RATE * 2**k for k in range(4))
# A grid that has grown to this has no best rate inside; the table says so.
MOST_RATES = 9

RANK = 16
"""Of LoRA at every other place, and what the ranks of the others follow from: see `METHODS`."""
PROBED_PLACES = 10
"""Half of those of `lora_dense` in ten layers."""


def _alternate(method: str, rank: int, **settings: Any) -> AdapterConfig:
    return AdapterConfig(method=method, rank=rank, alpha=2 * rank, **settings)


def _dense(rank: int) -> AdapterConfig:
    return AdapterConfig(
        method="lora", rank=rank, alpha=2 * rank, alternate=(), every_layer=("q_proj", "v_proj")
    )


# Whatever is a baseline in a hypothesis has at least its rival's parameters: hence the ranks of 14 and 15.
# The output is scaled by 2 at every rank. `probe` has no configuration: its places are found (`training`).
METHODS: Mapping[str, AdapterConfig | None] = {
    "lora": _alternate("lora", RANK),
    "lora_dense": _dense(RANK // 2),
    "lora_dense_equal_rank": _dense(RANK),
    "paper": _alternate("ssmlora", RANK - 1),
    "paper_no_carry": _alternate("ssmlora", RANK, carry="none"),
    "constant": _alternate("constant", RANK),
    "rolled": _alternate("rolled", RANK - 1),
    "gated": _alternate("gated", RANK - 2),
    "probe": None,
}


@dataclass(frozen=True)
class Setting:
    """What all runs of one length share, beside method, rate and seed.

    Args:
        model: name of the model's directory.
        first_layer: the first decoder layer with adapters; what comes below is computed once.
        length: tokens of a text.
        steps: of the optimiser.
        batch: texts of a step, equally many of each task of the set.
        num_train: texts of the pool from which a seed draws those of its run, over all tasks of the set.
        num_validation, num_test: texts of each task that are scored.
    """

    model: str
    first_layer: int
    length: int
    steps: int
    batch: int
    num_train: int
    num_validation: int
    num_test: int


@dataclass(frozen=True)
class Run:
    """One training and its scores."""

    phase: Phase
    task_set: str
    length: int
    method: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return "/".join(map(str, asdict(self).values()))


Row = Mapping[str, Any]


def run_of(row: Row) -> Run:
    """The run that has left a row."""
    return Run(**{key: row[key] for key in Run.__dataclass_fields__})


def done(rows: Iterable[Row]) -> dict[Run, dict[str, Row]]:
    """The runs that have a row for each of their tasks, and these by task."""
    found: dict[Run, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(run_of(row), {})[row["task"]] = row
    return {run: by_task for run, by_task in found.items() if set(by_task) == set(TASK_SETS[run.task_set])}


def tuned_losses(runs: Mapping[Run, Mapping[str, Row]], cell: tuple[str, int, str]) -> dict[float, float]:
    """Validation loss by rate, ascending: the mean over tasks and tuning seeds; inf where one diverged.

    A rate of which a seed is still to be run is not among them: the grid grows by means of all seeds alone.

    Args:
        runs: from `done`.
        cell: task set, length and method.
    """
    losses: dict[float, list[list[float]]] = {}
    for run, by_task in runs.items():
        if run.phase == "tuning" and (run.task_set, run.length, run.method) == cell:
            of_run = [math.inf if row["loss"] is None else row["loss"] for row in by_task.values()]
            losses.setdefault(run.rate, []).append(of_run)
    whole = {
        rate: [loss for of_run in each for loss in of_run]
        for rate, each in losses.items()
        if len(each) == len(TUNING_SEEDS)
    }
    return {rate: math.fsum(each) / len(each) for rate, each in sorted(whole.items())}


def rates_to_tune(losses: Mapping[float, float]) -> tuple[float, ...]:
    """The grid, with one rate more at the side where the best one is at its edge.

    Args:
        losses: of all rates of the grid so far; of none to begin with.
    """
    if not set(START_RATES) <= set(losses):
        return START_RATES
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    if len(rates) >= MOST_RATES:
        return tuple(rates)
    if best == rates[0]:
        return (best / 2, *rates)
    if best == rates[-1]:
        return (*rates, best * 2)
    return tuple(rates)


def next_runs(rows: Sequence[Row], cells: Iterable[tuple[str, int, str]]) -> list[Run]:
    """The runs that can be started, in the order in which to do so; none when the study is complete.

    Tuning first; then one final seed after the other for all methods, so that a study that is stopped has
    whole pairs.

    Args:
        rows: that exist.
        cells: of task set, length and method.
    """
    runs = done(rows)
    wanted: list[Run] = []
    for cell in cells:
        losses = tuned_losses(runs, cell)
        rates = rates_to_tune(losses)
        tuning = [Run("tuning", *cell, rate, seed) for seed in TUNING_SEEDS for rate in rates]
        waiting = [run for run in tuning if run not in runs]
        if not waiting:
            best = min(losses, key=losses.__getitem__)
            waiting = [run for seed in FINAL_SEEDS if (run := Run("final", *cell, best, seed)) not in runs]
        wanted += waiting
    return sorted(wanted, key=lambda run: (run.phase == "final", run.seed))


def num_runs_left(rows: Sequence[Row], cells: Sequence[tuple[str, int, str]]) -> int:
    """How many runs are left at least: rates that are not known to be needed yet do not count."""
    final = {run for run in done(rows) if run.phase == "final"}
    tuning = [run for run in next_runs(rows, cells) if run.phase == "tuning"]
    ended = sum((run.task_set, run.length, run.method) in set(cells) for run in final)
    return len(tuning) + len(FINAL_SEEDS) * len(cells) - ended


def summary(row: Row) -> str:
    """A row in some words."""
    loss = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
    return f"{row['task']} {loss}, {100 * row['accuracy']:.1f}%, {row['cpu_seconds']:.0f} CPU seconds"


def check_settings(rows: Iterable[Row], settings: Iterable[Setting], path: Path) -> None:
    """Finds rows that were made otherwise than is asked for now.

    Raises:
        DataError: there is one.
    """
    by_length = {setting.length: asdict(setting) for setting in settings}
    for number, row in enumerate(rows, 1):
        now = by_length.get(row["length"])
        if now is not None and row["setting"] != now:
            changed = [key for key in now if row["setting"].get(key) != now[key]]
            raise DataError(
                f"{path}:{number}: was made with "
                + ", ".join(f"{key} {row['setting'].get(key)!r} (now {now[key]!r})" for key in changed)
                + "; rows of one file share these: give the same again, or name another --rows"
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every script that trains: model, sizes, device, and where rows and caches are."""
    add = parser.add_argument
    add("--model", type=path_argument, default=MODEL, metavar="DIR", help="(default: %(default)s)")
    add("--first-layer", type=int, default=20, metavar="N", help="first adapted (default: %(default)s)")
    add("--tokens", type=int, metavar="N", help="of a run's training texts, instead of --steps")
    add("--steps", type=int, default=40, metavar="N", help="(default: %(default)s)")
    add("--batch", type=int, default=2, metavar="N", help="texts of a step (default: %(default)s)")
    add("--num-train", type=int, metavar="N", help="pool of training texts (default: twice those of a run)")
    add("--num-validation", type=int, default=30, metavar="N", help="texts of a task (default: %(default)s)")
    add("--num-test", type=int, default=48, metavar="N", help="texts of a task (default: %(default)s)")
    add("--babi", type=path_argument, metavar="DIR", help="bAbI files, for the task set babi")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--cache", type=path_argument, default=CACHE, metavar="DIR", help="(default: %(default)s)")
    add_rows_argument(parser)


def add_rows_argument(parser: argparse.ArgumentParser) -> None:
    """Where rows are."""
    default = RESULTS / f"accuracy_{MODEL.name}.jsonl"
    parser.add_argument(
        "--rows", type=path_argument, default=default, metavar="FILE", help="(default: %(default)s)"
    )


def setting_of(arguments: argparse.Namespace, length: int) -> Setting:
    """The setting that the arguments of `add_arguments` give for a length.

    Raises:
        DataError: sizes that no run can have.
    """
    steps = arguments.steps
    if arguments.tokens is not None:
        steps = max(1, arguments.tokens // (length * arguments.batch))
    sizes = {"batch": arguments.batch, "num_validation": arguments.num_validation}
    for name, size in (sizes | {"num_test": arguments.num_test}).items():
        if size < 2 or size % 2:
            raise DataError(
                f"--{name.replace('_', '-')} {size} given; allowed: even numbers from 2 on, since a task set "
                "has two tasks, and a rolled state needs another row; change it"
            )
    num_train = arguments.num_train or 2 * steps * arguments.batch
    if num_train < steps * arguments.batch:
        raise DataError(
            f"--num-train {num_train} given, and a run has {steps} steps of {arguments.batch} texts; "
            f"allowed: from {steps * arguments.batch} on; change it"
        )
    return Setting(
        model=arguments.model.resolve().name,
        first_layer=arguments.first_layer,
        length=length,
        steps=steps,
        batch=arguments.batch,
        num_train=num_train,
        num_validation=arguments.num_validation,
        num_test=arguments.num_test,
    )
