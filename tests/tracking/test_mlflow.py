from __future__ import annotations

import importlib.util
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.tracking import NullTracker, flat_parameters, mlflow_tracker, store_uri
from ssmlora_dist.tracking import mlflow as tracking_mlflow
from ssmlora_dist.tracking.mlflow import MAX_METRICS_PER_BATCH, MAX_PARAMETER_LENGTH

EXPERIMENT = "test experiment"
# Against a machine that is busy with other things: the trackers themselves need about two seconds.
DEAD_SERVER_SECONDS = 20.0


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all tests of the module: its tables take a second to make."""
    return tmp_path_factory.mktemp("output dir")


@pytest.fixture(scope="module", autouse=True)
def current_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that MLflow writes belongs into the current directory."""
    directory = tmp_path_factory.mktemp("current")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        yield directory


@pytest.fixture(autouse=True)
def mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


@pytest.fixture
def warnings() -> list[str]:
    return []


def recorded(output_dir: Path, run_id: str | None) -> Any:
    from mlflow.tracking import MlflowClient

    assert run_id is not None
    return MlflowClient(store_uri(output_dir)).get_run(run_id)


def history(output_dir: Path, run_id: str | None, name: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    points = MlflowClient(store_uri(output_dir)).get_metric_history(run_id, name)
    return [(point.step, point.value) for point in points]


def test_a_finished_run_holds_parameters_curves_and_artifacts_and_says_nothing(
    output_dir: Path,
    current_directory: Path,
    tmp_path: Path,
    warnings: list[str],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "report.txt").write_text("report")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights.bin").write_bytes(b"123")

    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    parameters = flat_parameters({"training": {"learning_rate": 2e-4, "betas": (0.9, 0.999)}, "uri": None})
    run_id = tracker.start("first run", parameters, {"git.commit": "abc"})
    assert tracker.run_id == run_id
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": 3.0 - step, "eval/length 64": step}, step)
    tracker.log_artifact(tmp_path / "report.txt")
    tracker.log_directory(adapter, "adapter")
    assert tracker.finish("FINISHED")

    run = recorded(output_dir, run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first run"
    assert run.data.params == {
        "training.learning_rate": "0.0002",
        "training.betas": "[0.9, 0.999]",
        "uri": "None",
    }
    assert run.data.tags["git.commit"] == "abc"
    assert history(output_dir, run_id, "loss") == [(1, 2.0), (2, 1.0), (3, 0.0)]
    assert history(output_dir, run_id, "eval/length 64") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    artifacts = output_dir / "mlartifacts" / str(run_id) / "artifacts"
    assert (artifacts / "report.txt").read_text() == "report"
    assert (artifacts / "adapter" / "weights.bin").read_bytes() == b"123"
    assert {path.name for path in output_dir.iterdir()} == {"mlflow.db", "mlartifacts"}
    assert list(current_directory.iterdir()) == []
    assert warnings == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_the_status_is_the_true_one(output_dir: Path, warnings: list[str], status: Any) -> None:
    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    run_id = tracker.start("bad run", {}, {})
    assert recorded(output_dir, run_id).info.status == "RUNNING"
    tracker.finish(status)
    assert recorded(output_dir, run_id).info.status == status


def test_whoever_ends_the_run_second_waits_for_the_first(
    output_dir: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread and that which ends a process that has lost a rank may do so at the same time."""
    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    run_id = tracker.start("ended twice", {}, {})
    closing, may_close = threading.Event(), threading.Event()
    close = tracking_mlflow.Delivery.close

    def close_late(*arguments: Any) -> None:
        closing.set()
        may_close.wait()
        close(*arguments)

    monkeypatch.setattr(tracking_mlflow.Delivery, "close", close_late)
    first, second = (
        threading.Thread(target=tracker.finish, args=[status], daemon=True)
        for status in ("FAILED", "FINISHED")
    )
    first.start()
    assert closing.wait(20)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    may_close.set()
    second.join(20)
    assert recorded(output_dir, run_id).info.status == "FAILED"
    assert warnings == []


def test_many_and_long_parameters(output_dir: Path, warnings: list[str]) -> None:
    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    parameters: dict[str, Any] = {f"key{number}": number for number in range(130)}
    parameters["long"] = "x" * (MAX_PARAMETER_LENGTH + 1)
    parameters["just fits"] = "x" * MAX_PARAMETER_LENGTH
    parameters["what?"] = 1
    run_id = tracker.start("parameters", parameters, {})
    tracker.finish("FINISHED")
    data = recorded(output_dir, run_id).data.params
    assert {key: data[key] for key in data if key.startswith("key")} == {
        f"key{n}": str(n) for n in range(130)
    }
    assert len(data["long"]) == MAX_PARAMETER_LENGTH
    assert data["long"].endswith("xxx ... [cut: 6001 characters]")
    assert data["just fits"] == parameters["just fits"]
    assert data["what_"] == "1"
    assert warnings == []


def test_more_metrics_than_a_batch_holds_and_numbers_that_are_not_finite(
    output_dir: Path, warnings: list[str]
) -> None:
    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    run_id = tracker.start("metrics", {}, {})
    last = MAX_METRICS_PER_BATCH + 10
    for step in range(1, last):
        tracker.log_metrics({"loss": step}, step)
    tracker.log_metrics({"loss": math.nan, "norm": math.inf}, last)
    tracker.finish("FINISHED")
    points = history(output_dir, run_id, "loss")
    assert points[:-1] == [(step, float(step)) for step in range(1, last)]
    assert points[-1][0] == last
    assert math.isnan(points[-1][1])
    assert math.isnan(history(output_dir, run_id, "norm")[0][1])
    assert warnings == []


def test_metrics_arrive_while_the_run_is_going_on(
    output_dir: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_mlflow, "FLUSH_SECONDS", 0.05)
    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    run_id = tracker.start("live", {}, {})
    deadline = time.monotonic() + 10
    step = 0
    while not (seen := history(output_dir, run_id, "loss")) and time.monotonic() < deadline:
        step += 1
        tracker.log_metrics({"loss": 1.0}, step)
        time.sleep(0.05)
    tracker.finish("FINISHED")
    assert seen
    assert len(history(output_dir, run_id, "loss")) == step


def test_a_continued_run_keeps_its_id_and_its_parameters(output_dir: Path, warnings: list[str]) -> None:
    first = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    run_id = first.start("run", {"max_steps": 10}, {})
    first.log_metrics({"loss": 2.0}, 1)
    first.finish("KILLED")

    second = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append, run_id=run_id)
    assert second.start("run", {"max_steps": 20, "new": 1}, {}) == run_id
    assert recorded(output_dir, run_id).info.status == "RUNNING"
    second.log_metrics({"loss": 1.0}, 2)
    second.finish("FINISHED")

    run = recorded(output_dir, run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"max_steps": "10", "new": "1"}
    assert history(output_dir, run_id, "loss") == [(1, 2.0), (2, 1.0)]
    assert warnings == []


def test_tags_are_added_and_replaced_on_the_way_and_by_who_continues(
    output_dir: Path, warnings: list[str]
) -> None:
    first = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    run_id = first.start("tagged", {}, {"kept": "1", "replaced": "1"})
    first.set_tags({"replaced": "2", "added": "2"})
    first.finish("KILLED")
    second = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append, run_id=run_id)
    second.start("tagged", {}, {"added": "3"})
    second.finish("FINISHED")
    tags = recorded(output_dir, run_id).data.tags
    assert {name: tags[name] for name in ("kept", "replaced", "added")} == {
        "kept": "1",
        "replaced": "2",
        "added": "3",
    }
    assert warnings == []


def test_a_run_that_cannot_be_continued_is_begun_anew(output_dir: Path, warnings: list[str]) -> None:
    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append, run_id="0" * 32)
    run_id = tracker.start("run", {}, {})
    tracker.finish("FINISHED")
    assert recorded(output_dir, run_id).info.status == "FINISHED"
    assert len(warnings) == 1
    assert f"cannot continue run {'0' * 32}" in warnings[0]


def test_a_missing_artifact_is_told_and_holds_up_nothing(
    output_dir: Path, tmp_path: Path, warnings: list[str]
) -> None:
    tracker = mlflow_tracker(output_dir, None, EXPERIMENT, warnings.append)
    run_id = tracker.start("run", {}, {})
    tracker.log_artifact(tmp_path / "absent.png")
    tracker.log_metrics({"loss": 1.0}, 1)
    assert not tracker.finish("FINISHED")
    assert recorded(output_dir, run_id).info.status == "FINISHED"
    assert history(output_dir, run_id, "loss") == [(1, 1.0)]
    assert len(warnings) == 2
    assert all("absent.png" in warning for warning in warnings)
    assert "1 update of the run was not recorded" in warnings[1]


@pytest.mark.parametrize("answers", ["refuses", "never answers"])
def test_a_dead_server_neither_stops_nor_stalls(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    monkeypatch.setattr(tracking_mlflow, "START_TIMEOUT_SECONDS", 3.0)
    monkeypatch.setattr(tracking_mlflow, "FINISH_TIMEOUT_AWAY_SECONDS", 3.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers == "never answers":
            server.listen()
        uri = f"http://somebody:secret@127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        tracker = mlflow_tracker(tmp_path, uri, EXPERIMENT, warnings.append)
        assert tracker.start("run", {"a": 1}, {}) is None
        started = time.monotonic()
        for step in range(1000):
            tracker.log_metrics({"loss": 1.0, "grad_norm": 2.0}, step)
        logged = time.monotonic()
        tracker.log_artifact(tmp_path)
        tracker.finish("FINISHED")
        ended = time.monotonic()
    assert ended - began < DEAD_SERVER_SECONDS
    assert logged - started < 1.0
    assert len(warnings) == 2
    assert "training goes on" in warnings[0]
    assert "the run was not recorded" in warnings[1]
    assert not any("secret" in warning for warning in warnings)
    assert list(tmp_path.iterdir()) == []


def test_where_a_store_keeps_its_files(tmp_path: Path, current_directory: Path) -> None:
    def files(uri: str) -> str | None:
        return tracking_mlflow._artifact_location(uri, tmp_path)

    assert store_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert store_uri(tmp_path, "http://server") == "http://server"
    assert files(store_uri(tmp_path)) == f"file://{tmp_path}/mlartifacts"
    assert files("sqlite:////data/runs.db") == "file:///data/mlartifacts"
    assert files("sqlite:///data/runs.db") == f"file://{current_directory}/data/mlartifacts"
    assert files("postgresql+psycopg2://user@host/db") == f"file://{tmp_path}/mlartifacts"
    assert files("https://server") is None
    assert files("databricks") is None


def test_what_is_said_of_a_failure_is_short_and_holds_no_password() -> None:
    error = OSError(
        "request to http://me:secret@host failed (Caused by NewConnection('http://me:secret@host: refused'))"
    )
    assert tracking_mlflow._in_short(error) == "NewConnection('http://***@host: refused')"
    assert tracking_mlflow._in_short(KeyError()) == "KeyError"
    assert len(tracking_mlflow._in_short(OSError("x" * 1000 + "\nmore"))) == 200


def test_without_mlflow_training_goes_on(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker = mlflow_tracker(tmp_path, None, EXPERIMENT, warnings.append)
    assert isinstance(tracker, NullTracker)
    assert tracker.start("run", {}, {}) is None
    tracker.finish("FINISHED")
    assert len(warnings) == 1
    assert "pip install mlflow" in warnings[0]


def test_flat_parameters() -> None:
    nested = {"a": {"b": {"c": 1}, "d": None}, "e": ["x", 2], "f": Path("p"), "g": {}, "h": True}
    assert flat_parameters(nested) == {"a.b.c": 1, "a.d": None, "e": '["x", 2]', "f": "p", "h": True}
