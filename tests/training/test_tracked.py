"""Where a run is recorded is looked at before anything long is done, on every road."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config import build
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import ConfigError, SSMLoRAError
from ssmlora_dist.sweep.plan import plan_sweep
from ssmlora_dist.sweep.recording import check_stores
from ssmlora_dist.tracking import Console
from ssmlora_dist.training import describe as dry_run
from ssmlora_dist.training import run, task_evaluation

from .test_task_evaluation import SingleProcess

CONFIG: dict[str, Any] = {
    "run": {"name": "tracked"},
    "model": {"path": "./nowhere", "tokenizer": "bytes"},
    "data": {"train": {"format": "task", "task": {"task": "passkey"}}},
    "training": {"max_steps": 1},
    "evaluation": {"tasks": [{"task": "passkey"}]},
}


def sweep(config: RunConfig) -> None:
    base = {**CONFIG, "model": {"init": "random", "config": {"model_type": "llama"}, "tokenizer": "bytes"}}
    Path("base.json").write_text(json.dumps(base))
    Path("sweep.json").write_text(
        json.dumps({"name": "s", "base": "base.json", "grid": {"adapter.rank": [2, 4]}})
    )
    check_stores(plan_sweep("sweep.json"), print)


ROADS: dict[str, Callable[[RunConfig], object]] = {
    "train": lambda config: run.run_training(config, SingleProcess(), Console(enabled=False)),
    "train --dry-run": lambda config: dry_run.describe(config, "cpu", 1, "never", print),
    "evaluate": lambda config: task_evaluation.run_evaluation(
        config, SingleProcess(), Console(enabled=False)
    ),
    "evaluate --dry-run": lambda config: task_evaluation.describe_evaluation(config, "cpu", 1, warn=print),
    "sweep": sweep,
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(CONFIG))
    return load_config(path, check_files=False)


@pytest.mark.parametrize("road", ROADS)
def test_a_store_that_cannot_be_ends_it_before_the_model_is_looked_for(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, road: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/self/stat/runs.db")
    with pytest.raises(ConfigError) as caught:
        ROADS[road](config)
    [line] = caught.value.problems
    assert line.startswith('MLFLOW_TRACKING_URI: "sqlite:////proc/self/stat/runs.db" cannot be made')
    # Nothing is wrong with that once nothing is tracked.
    if road != "sweep":
        tracking = config.tracking.model_copy(update={"tracker": "none"})
        with pytest.raises(SSMLoRAError, match="nowhere"):
            ROADS[road](config.model_copy(update={"tracking": tracking}))


def test_a_sweep_s_points_are_recorded_where_the_environment_says(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(config)
    stores = [build.build_store(point.config) for point in plan_sweep("sweep.json").points]
    assert [store and store.uri for store in stores] == [f"sqlite:///{Path.cwd()}/sweeps/mlflow.db"] * 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    stores = [build.build_store(point.config) for point in plan_sweep("sweep.json").points]
    said = 'http://server (MLFLOW_TRACKING_URI), experiment "theirs" (MLFLOW_EXPERIMENT_NAME)'
    assert [str(store) for store in stores] == [said] * 2
