from __future__ import annotations

import importlib.util
import math
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from ssmlora_dist.errors import ConfigError
from ssmlora_dist.progress import shown_by
from ssmlora_dist.tracking import (
    NullTracker,
    Store,
    Tracker,
    check_store,
    choose_store,
    flat_parameters,
    mlflow_store,
    mlflow_tracker,
)
from ssmlora_dist.tracking import mlflow as tracking_mlflow
from ssmlora_dist.tracking.limits import MAX_METRICS_PER_BATCH, MAX_PARAMETER_LENGTH, in_short
from ssmlora_dist.tracking.processes import Process

from ..launch.processes import finish
from ..told import Told

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


def store_in(output_dir: Path, uri: str | None = None, experiment: str = EXPERIMENT) -> Store:
    return choose_store(output_dir, uri, experiment, {})


def tracker_in(
    output_dir: Path, warnings: list[str], uri: str | None = None, run_id: str | None = None
) -> Tracker:
    return mlflow_tracker(store_in(output_dir, uri), warnings.append, run_id)


def recorded(output_dir: Path, run_id: str | None) -> Any:
    assert run_id is not None
    return MlflowClient(store_in(output_dir).uri).get_run(run_id)


def history(output_dir: Path, run_id: str | None, name: str) -> list[tuple[int, float]]:
    points = MlflowClient(store_in(output_dir).uri).get_metric_history(run_id, name)
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

    tracker = tracker_in(output_dir, warnings)
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
    tracker = tracker_in(output_dir, warnings)
    run_id = tracker.start("bad run", {}, {})
    assert recorded(output_dir, run_id).info.status == "RUNNING"
    tracker.finish(status)
    assert recorded(output_dir, run_id).info.status == status


def test_whoever_ends_the_run_second_waits_for_the_first(
    output_dir: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread and that which ends a process that has lost a rank may do so at the same time."""
    tracker = tracker_in(output_dir, warnings)
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
    tracker = tracker_in(output_dir, warnings)
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
    tracker = tracker_in(output_dir, warnings)
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
    tracker = tracker_in(output_dir, warnings)
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
    first = tracker_in(output_dir, warnings)
    run_id = first.start("run", {"max_steps": 10}, {})
    first.log_metrics({"loss": 2.0}, 1)
    first.finish("KILLED")

    second = tracker_in(output_dir, warnings, run_id=run_id)
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
    first = tracker_in(output_dir, warnings)
    run_id = first.start("tagged", {}, {"kept": "1", "replaced": "1"})
    first.set_tags({"replaced": "2", "added": "2"})
    first.finish("KILLED")
    second = tracker_in(output_dir, warnings, run_id=run_id)
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
    tracker = tracker_in(output_dir, warnings, run_id="0" * 32)
    run_id = tracker.start("run", {}, {})
    tracker.finish("FINISHED")
    assert recorded(output_dir, run_id).info.status == "FINISHED"
    assert len(warnings) == 1
    assert f"cannot continue run {'0' * 32}" in warnings[0]


def test_a_missing_artifact_is_told_and_holds_up_nothing(
    output_dir: Path, tmp_path: Path, warnings: list[str]
) -> None:
    tracker = tracker_in(output_dir, warnings)
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
        tracker = tracker_in(tmp_path, warnings, uri=uri)
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


def test_what_is_said_of_a_failure_is_short_and_holds_no_password() -> None:
    error = OSError(
        "request to http://me:secret@host failed (Caused by NewConnection('http://me:secret@host: refused'))"
    )
    assert in_short(error) == "NewConnection('http://***@host: refused')"
    assert in_short(KeyError()) == "KeyError"
    assert len(in_short(OSError("x" * 1000 + "\nmore"))) == 200


def test_without_mlflow_training_goes_on(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracker = tracker_in(tmp_path, warnings)
    assert isinstance(tracker, NullTracker)
    assert tracker.start("run", {}, {}) is None
    tracker.finish("FINISHED")
    assert len(warnings) == 1
    assert "pip install mlflow" in warnings[0]


def test_flat_parameters() -> None:
    nested = {"a": {"b": {"c": 1}, "d": None}, "e": ["x", 2], "f": Path("p"), "g": {}, "h": True}
    assert flat_parameters(nested) == {"a.b.c": 1, "a.d": None, "e": '["x", 2]', "f": "p", "h": True}


def test_runs_that_begin_at_once_in_a_new_store_are_all_recorded(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ssmlora_dist.tracking import choose_store, mlflow_tracker\n"
        "tracker = mlflow_tracker(choose_store(Path('runs'), None, 'new', {}), print)\n"
        "tracker.start(sys.argv[1], {}, {})\n"
        "print(tracker.finish('FINISHED'))\n"
    )
    finished = finish([[sys.executable, "-c", script, name] for name in "abc"], tmp_path, [{}] * 3)
    assert [(one.exit_code, one.stdout, one.stderr) for one in finished] == [(0, "True\n", "")] * 3
    runs = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db").search_runs(["1"])
    assert sorted(run.info.run_name for run in runs) == ["a", "b", "c"]
    # Nothing that was made beside the store is left.
    assert {path.name for path in (tmp_path / "runs").iterdir()} <= {"mlflow.db", "mlartifacts"}


def test_a_killed_start_leaves_no_half_of_a_store(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(mlflow_store, "_put", die)
    tracker = tracker_in(tmp_path, warnings)
    assert tracker.start("run", {}, {}) is None
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == []


def test_names_that_a_uri_might_take_for_something_else(tmp_path: Path, warnings: list[str]) -> None:
    output_dir = tmp_path / "50% of a#b, %zz ü;&'=+@"
    (tmp_path / "file").write_text("x")
    tracker = tracker_in(output_dir, warnings)
    run_id = tracker.start("run", {}, {})
    tracker.log_artifact(tmp_path / "file")
    assert tracker.finish("FINISHED"), warnings
    assert (output_dir / "mlartifacts" / str(run_id) / "artifacts" / "file").read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {"file", output_dir.name}


def test_a_deleted_experiment_is_found_before_the_work(output_dir: Path, warnings: list[str]) -> None:
    client = MlflowClient(store_in(output_dir).uri)
    number = client.create_experiment("deleted")
    check_store(store_in(output_dir, experiment="deleted"), warnings.append)
    client.delete_experiment(number)
    with pytest.raises(ConfigError, match=r'tracking.experiment: experiment "deleted" is deleted') as caught:
        check_store(store_in(output_dir, experiment="deleted"), warnings.append)
    assert f"restore --experiment-id {number}" in str(caught.value)
    by_variable = choose_store(output_dir, None, None, {"MLFLOW_EXPERIMENT_NAME": "deleted"})
    with pytest.raises(ConfigError, match="MLFLOW_EXPERIMENT_NAME: experiment"):
        check_store(by_variable, warnings.append)
    assert warnings == []


def test_an_experiment_by_its_number(output_dir: Path, warnings: list[str]) -> None:
    number = MlflowClient(store_in(output_dir).uri).create_experiment("by number")
    store = choose_store(output_dir, None, None, {"MLFLOW_EXPERIMENT_ID": number})
    check_store(store, warnings.append)
    tracker = mlflow_tracker(store, warnings.append)
    run_id = tracker.start("run", {}, {})
    tracker.finish("FINISHED")
    assert recorded(output_dir, run_id).info.experiment_id == number
    for variables, said in (
        ({"MLFLOW_EXPERIMENT_ID": "999"}, "MLFLOW_EXPERIMENT_ID: 999 given; .* has no such experiment"),
        ({"MLFLOW_EXPERIMENT_ID": number, "MLFLOW_EXPERIMENT_NAME": "x"}, 'is "by number", with MLFLOW_'),
    ):
        with pytest.raises(ConfigError, match=said):
            check_store(choose_store(output_dir, None, None, variables), warnings.append)
    with pytest.raises(ConfigError, match="has no such experiment"):
        check_store(
            choose_store(output_dir / "new", None, None, {"MLFLOW_EXPERIMENT_ID": "5"}), warnings.append
        )
    assert warnings == []


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("htp://server:5000", "allowed: http://HOST:PORT"),
        ("localhost:5000", "allowed: http://HOST:PORT"),
        ("mlruns", "maintenance mode"),
        ("http://127.0.0.1:99999", "Port out of range"),
    ],
)
def test_a_mistyped_uri_is_found_before_the_work(
    tmp_path: Path, warnings: list[str], uri: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_store(store_in(tmp_path, uri), warnings.append)
    [line] = caught.value.problems
    assert line.startswith(f'tracking.uri: "{uri}" ')
    assert said in line
    assert warnings == []
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_a_store_makes_none(tmp_path: Path, warnings: list[str]) -> None:
    check_store(store_in(tmp_path / "runs"), warnings.append)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_a_warning(tmp_path: Path, warnings: list[str]) -> None:
    told = Told()
    with socket.socket() as server, shown_by(told):
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_store(store_in(tmp_path, f"http://me:secret@{address}"), warnings.append)
    [warning] = warnings
    assert "is away" in warning
    assert "secret" not in warning
    # One that gives no answer at all is waited for, and that is shown.
    assert told.ended == [(f"looking for the experiment at http://***@{address}", False)]


def test_runs_whose_process_is_gone_are_marked_as_killed(output_dir: Path, warnings: list[str]) -> None:
    client = MlflowClient(store_in(output_dir).uri)
    own = Process.own()
    assert own is not None
    gone = replace(own, start="1")
    owners = {"lost": gone, "alive": own, "elsewhere": replace(gone, host="other"), "continued": gone}
    experiment = client.get_experiment_by_name(EXPERIMENT)
    number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    runs = {
        name: client.create_run(number, run_name=name, tags=owner.tags()).info.run_id
        for name, owner in owners.items()
    }
    runs["of no one"] = client.create_run(number, run_name="of no one").info.run_id

    tracker = tracker_in(output_dir, warnings, run_id=runs["continued"])
    tracker.start("continued", {}, {})
    assert recorded(output_dir, runs["continued"]).data.tags["process.start"] == own.start
    tracker.finish("FINISHED")
    status = {name: recorded(output_dir, run_id).info.status for name, run_id in runs.items()}
    assert status == {
        "lost": "KILLED",
        "alive": "RUNNING",
        "elsewhere": "RUNNING",
        "continued": "FINISHED",
        "of no one": "RUNNING",
    }
    assert warnings == ["MLflow: lost: killed, as the process is gone; the status says so now"]
