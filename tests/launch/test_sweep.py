"""`launch/sweep.py` with real trainings of a tiny model, on one rank and on two."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .materials import MODEL
from .processes import ROOT, Finished, run

SWEEP_SCRIPT = ROOT / "launch" / "sweep.py"
RETRIEVAL = {"lengths": [224], "depths": [0], "num_lookalikes": 0, "num_digits": 2, "num_examples": 4}
BASE: dict[str, Any] = {
    "run": {"name": "base"},
    "model": {"init": "random", "config": MODEL, "tokenizer": "bytes", "compute_dtype": "float32"},
    "quantization": {"mode": "none"},
    "adapter": {"rank": 2, "alpha": 4},
    "data": {"train": {"format": "retrieval", "retrieval": RETRIEVAL}, "max_length": 224},
    "training": {"max_steps": 2, "global_batch_size": 2, "learning_rate": 1e-2},
}
SWEEP: dict[str, Any] = {
    "name": "real",
    "base": "base.json",
    "grid": {
        "kind": {
            "alone": {},
            "two_ranks": {"launcher.ranks": 2},
        }
    },
    "list": [
        {
            "name": "diverges",
            "overrides": {"training.learning_rate": 1e30, "training.max_nonfinite_steps": 1},
        }
    ],
    "baseline": "alone",
    "launcher": {"points_at_once": 3},
}


@dataclass(frozen=True)
class Runs:
    """What the script left, run twice."""

    directory: Path
    first: Finished
    second: Finished

    @property
    def sweep(self) -> Path:
        return self.directory / "sweeps" / "real"

    @property
    def rows(self) -> dict[str, Any]:
        return {row["point"]: row for row in map(json.loads, (self.sweep / "points.jsonl").open())}


def sweep_command(*arguments: str) -> list[str]:
    return [sys.executable, str(SWEEP_SCRIPT), *arguments]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("sweeps")
    (directory / "base.json").write_text(json.dumps(BASE))
    (directory / "sweep.json").write_text(json.dumps(SWEEP))
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    first, second = (run(sweep_command("--config", "sweep.json"), directory, **on_cpu) for _ in range(2))
    return Runs(directory, first, second)


def test_the_table_has_every_point_the_failed_one_with_its_reason(runs: Runs) -> None:
    assert runs.first.exit_code == 0, runs.first
    assert {name: row["outcome"] for name, row in runs.rows.items()} == {
        "alone_seed-0": "finished",
        "two_ranks_seed-0": "finished",
        "diverges_seed-0": "failed",
    }, runs.first
    failed = runs.rows["diverges_seed-0"]
    assert failed["exit_code"] == 3
    assert failed["reason"].startswith("diverged: step 2: loss or gradients were not finite")
    for name in runs.rows:
        assert name in runs.first.stdout
    assert failed["reason"] in runs.first.stdout
    assert "3 points, 2 finished, 1 failed" in runs.first.stdout


def test_started_again_it_runs_nothing(runs: Runs) -> None:
    assert runs.second.exit_code == 0, runs.second
    assert runs.second.stdout == runs.first.stdout
    for name in runs.rows:
        log = (runs.sweep / "logs" / f"{name}.log").read_text()
        assert sum(line.startswith("$ ") for line in log.splitlines()) == 1


def test_metrics_are_those_of_the_runs(runs: Runs) -> None:
    for name, ranks in (("alone_seed-0", 1), ("two_ranks_seed-0", 2)):
        summary = json.loads((runs.sweep / "runs" / name / "summary.json").read_text())
        metrics = runs.rows[name]["metrics"]
        assert metrics["num_ranks"] == ranks
        assert metrics["final_loss"] == summary["last_loss"]
        assert metrics["peak_memory_gib"] == max(summary["peak_memory_gib"])
        assert metrics["tokens_per_second"] == pytest.approx(ranks * metrics["tokens_per_second_per_device"])


def test_mlflow_has_a_parent_and_a_child_for_each_point_with_true_statuses(runs: Runs) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{runs.directory / 'sweeps' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ssmlora_dist")
    assert experiment is not None
    found = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    assert {name: one.info.status for name, one in found.items()} == {
        "real": "FINISHED",
        "alone_seed-0": "FINISHED",
        "two_ranks_seed-0": "FINISHED",
        "diverges_seed-0": "FAILED",
    }
    parent = found.pop("real")
    assert parent.data.metrics["num_finished"] == 2
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
        # Of two ranks one has logged.
        assert len(client.get_metric_history(child.info.run_id, "loss")) == 2
    assert found["diverges_seed-0"].data.tags["sweep.reason"] == runs.rows["diverges_seed-0"]["reason"]
    result = found["two_ranks_seed-0"].data.metrics["result/num_ranks"]
    assert result == 2


def test_a_dry_run_shows_the_plan_and_leaves_nothing(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    (tmp_path / "sweep.json").write_text(json.dumps(SWEEP | {"seeds": [0, 1]}))
    done = run(sweep_command("--config", "sweep.json", "--dry-run"), tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "6 points, 6 to run, 3 at once; estimated time: unknown, no point is finished yet"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.json", "sweep.json"]


def test_bad_input_is_named_and_nothing_runs(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    bad = SWEEP | {"grid": {"adapter.rnk": [1]}, "list": []}
    (tmp_path / "sweep.json").write_text(json.dumps(bad | {"baseline": None}))
    done = run(sweep_command("--config", "sweep.json"), tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: sweep.json: 1 problem\n  adapter.rnk: unknown key (1 given)")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sweeps").exists()
