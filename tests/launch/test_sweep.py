"""`launch/sweep.py` with real trainings of a tiny model.

All command lines run in one process, the trainings in processes of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .conftest import SCRIPTS_WORKER
from .materials import MODEL
from .processes import ROOT, Finished, run, without_progress

SWEEP_SCRIPT = ROOT / "launch" / "sweep.py"
PASSKEY = {"task": "passkey", "lengths": [224], "depths": [0], "num_examples": 4}
BASE: dict[str, Any] = {
    "run": {"name": "base"},
    "model": {"init": "random", "config": MODEL, "tokenizer": "bytes", "compute_dtype": "float32"},
    "quantization": {"mode": "none"},
    "adapter": {"rank": 2, "alpha": 4},
    "data": {"train": {"format": "task", "task": PASSKEY}, "max_length": 224},
    "training": {"max_steps": 2, "global_batch_size": 2, "learning_rate": 1e-2},
}
SWEEP: dict[str, Any] = {
    "name": "real",
    "base": "base.json",
    "grid": {"kind": {"alone": {}}},
    "list": [{"name": "refused", "overrides": {"data.train": {"format": "text", "path": "broken.jsonl"}}}],
    "baseline": "alone",
    "launcher": {"points_at_once": 2},
}
DIVERGES = {"training.learning_rate": 1e30, "training.max_nonfinite_steps": 1}
MORE = SWEEP | {
    "name": "more",
    "grid": {"kind": {"two_ranks": {"launcher.ranks": 2}}},
    "list": [{"name": "diverges", "overrides": DIVERGES}],
    "baseline": None,
}
PLANNED = SWEEP | {"name": "planned", "seeds": [0, 1]}
BAD = SWEEP | {"name": "bad", "grid": {"adapter.rnk": [1]}, "baseline": None, "list": []}


@dataclass(frozen=True)
class Runs:
    """What the script left: refused, planned, run, and run again."""

    directory: Path
    bad: Finished
    planned: Finished
    first: Finished
    second: Finished

    @property
    def sweep(self) -> Path:
        return self.directory / "sweeps" / "real"

    @property
    def rows(self) -> dict[str, Any]:
        return rows_of(self.sweep)


def rows_of(sweep: Path) -> dict[str, Any]:
    return {row["point"]: row for row in map(json.loads, (sweep / "points.jsonl").open())}


def run_sweeps(directory: Path, *commands: Sequence[str]) -> list[Finished]:
    """`launch/sweep.py` with each of these arguments, one after another."""
    for sweep in (SWEEP, MORE, PLANNED, BAD):
        (directory / f"{sweep['name']}.json").write_text(json.dumps(sweep))
    (directory / "base.json").write_text(json.dumps(BASE))
    (directory / "broken.jsonl").write_text('{"text": \n')
    (directory / "commands").write_text(json.dumps([[str(SWEEP_SCRIPT), *command] for command in commands]))
    worker = run(
        ["-m", SCRIPTS_WORKER, "commands", "results"],
        directory,
        CUDA_VISIBLE_DEVICES="",
        DS_ACCELERATOR="cpu",
    )
    assert worker.exit_code == 0, worker.stderr
    return [
        Finished(code, stdout, without_progress(stderr))
        for code, stdout, stderr in json.loads((directory / "results").read_text())
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("sweeps")
    commands = (
        ["--config", "bad.json"],
        ["--config", "planned.json", "--dry-run"],
        ["--config", "real.json"],
        ["--config", "real.json"],
    )
    return Runs(directory, *run_sweeps(directory, *commands))


def test_the_table_has_every_point_the_failed_one_with_its_reason(runs: Runs) -> None:
    assert runs.first.exit_code == 0, runs.first
    assert {name: row["outcome"] for name, row in runs.rows.items()} == {
        "alone_seed-0": "finished",
        "refused_seed-0": "failed",
    }, runs.first
    failed = runs.rows["refused_seed-0"]
    assert failed["exit_code"] == 2
    assert failed["reason"].startswith("broken.jsonl:1: ")
    for name in runs.rows:
        assert name in runs.first.stdout
    assert failed["reason"] in runs.first.stdout
    assert "2 points, 1 finished, 1 failed" in runs.first.stdout


def test_started_again_it_runs_nothing(runs: Runs) -> None:
    assert runs.second.exit_code == 0, runs.second
    assert runs.second.stdout == runs.first.stdout
    for name in runs.rows:
        log = (runs.sweep / "logs" / f"{name}.log").read_text()
        assert sum(line.startswith("$ ") for line in log.splitlines()) == 1


def test_metrics_are_those_of_the_runs(runs: Runs) -> None:
    summary = json.loads((runs.sweep / "runs" / "alone_seed-0" / "summary.json").read_text())
    metrics = runs.rows["alone_seed-0"]["metrics"]
    assert metrics["num_ranks"] == 1
    assert metrics["final_loss"] == summary["last_loss"]
    assert metrics["peak_memory_gib"] == max(summary["peak_memory_gib"])
    assert metrics["tokens_per_second"] == metrics["tokens_per_second_per_device"]


def recorded(directory: Path) -> tuple[Any, dict[str, Any]]:
    """The store of a sweep, and the runs in it by name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{directory / 'sweeps' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ssmlora_dist")
    assert experiment is not None
    return client, {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}


def test_mlflow_has_a_parent_and_a_child_for_each_point_with_true_statuses(runs: Runs) -> None:
    client, found = recorded(runs.directory)
    assert {name: one.info.status for name, one in found.items()} == {
        "real": "FINISHED",
        "alone_seed-0": "FINISHED",
        "refused_seed-0": "FAILED",
    }
    parent = found.pop("real")
    assert parent.data.metrics["num_finished"] == 1
    assert parent.data.metrics["num_failed"] == 1
    artifacts = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"sweep.json", "points.jsonl", "report"}
    for name, child in found.items():
        row = runs.rows[name]
        assert row["mlflow_run_id"] == child.info.run_id
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["sweep.group"] == row["group"]
        assert child.data.tags["sweep.outcome"] == row["outcome"]
        assert child.data.params["training.max_steps"] == "2"
    # It had begun nothing itself.
    assert found["refused_seed-0"].data.tags["sweep.reason"] == runs.rows["refused_seed-0"]["reason"]
    alone = found["alone_seed-0"]
    assert alone.data.metrics["result/num_ranks"] == 1
    assert len(client.get_metric_history(alone.info.run_id, "loss")) == 2


def test_a_dry_run_shows_the_plan_and_leaves_nothing(runs: Runs) -> None:
    assert runs.planned.exit_code == 0, runs.planned
    assert runs.planned.stdout.splitlines()[-1] == (
        "4 points, 4 to run, 2 at once; estimated time: unknown, no point is finished yet"
    )
    assert not (runs.directory / "sweeps" / "planned").exists()


def test_bad_input_is_named_and_nothing_runs(runs: Runs) -> None:
    assert runs.bad.exit_code == 2
    assert runs.bad.stderr.startswith("error: bad.json: 1 problem\n  adapter.rnk: unknown key (1 given)")
    assert "Traceback" not in runs.bad.stderr
    assert not (runs.directory / "sweeps" / "bad").exists()


@pytest.mark.slow
def test_a_point_of_two_ranks_is_recorded_once_and_one_that_diverges_says_so(tmp_path: Path) -> None:
    (done,) = run_sweeps(tmp_path, ["--config", "more.json"])
    assert done.exit_code == 0, done
    sweep = tmp_path / "sweeps" / "more"
    finished, failed = rows_of(sweep).values()
    assert finished["outcome"] == "finished", finished
    assert (failed["outcome"], failed["exit_code"]) == ("failed", 3)
    assert failed["reason"].startswith("diverged: step 2: loss or gradients were not finite")
    metrics = finished["metrics"]
    assert metrics["num_ranks"] == 2
    assert metrics["tokens_per_second"] == pytest.approx(2 * metrics["tokens_per_second_per_device"])
    client, found = recorded(tmp_path)
    assert {name: one.info.status for name, one in found.items()} == {
        "more": "FINISHED",
        "two_ranks_seed-0": "FINISHED",
        "diverges_seed-0": "FAILED",
    }
    child = found["two_ranks_seed-0"]
    assert len(client.get_metric_history(child.info.run_id, "loss")) == 2
    assert child.data.metrics["result/num_ranks"] == 2
