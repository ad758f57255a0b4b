"""The tracker's side of a sweep, over a store that is kept in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.sweep import recording
from ssmlora_dist.sweep.execute import Result, run_sweep
from ssmlora_dist.sweep.plan import Plan
from ssmlora_dist.sweep.recording import PARENT_TAG, Recorder

from .sweeps import plan_of, resources

GRID = {"adapter.rank": [2, 4]}
FIRST, SECOND = "rank-2_seed-0", "rank-4_seed-0"


class Store:
    """Runs by their id; it is away at those attempts to begin a run, and at the first end of `deaf` ones."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.away = range(0)
        self.attempts = 0
        self.deaf: list[str] = []

    def of(self, name: str) -> list[dict[str, Any]]:
        return [run for run in self.runs.values() if run["name"] == name]

    def status(self) -> dict[str, list[str]]:
        return {
            name: [run["status"] for run in self.of(name)]
            for name in sorted({r["name"] for r in self.runs.values()})
        }


class FakeTracker:
    def __init__(self, store: Store, run_id: str | None) -> None:
        self._store, self._continued = store, run_id
        self.run_id: str | None = None
        self._begin: Callable[[], None] | None = None

    def start(self, run_name: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> str | None:
        def begin() -> None:
            self._store.attempts += 1
            if self._store.attempts - 1 in self._store.away:
                return
            self.run_id = self._continued or f"{run_name}-{len(self._store.of(run_name))}"
            run = self._store.runs.setdefault(self.run_id, {"name": run_name, "tags": {}, "metrics": {}})
            run["status"] = "RUNNING"
            run["tags"] |= tags

        self._begin = begin
        begin()
        return self.run_id

    def _run(self) -> dict[str, Any]:
        return self._store.runs[self.run_id] if self.run_id else {"tags": {}, "metrics": {}}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._run()["metrics"] |= metrics

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._run()["tags"] |= tags

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        assert path.is_file()

    def log_directory(self, path: Path, artifact_path: str | None = None) -> None:
        assert path.is_dir()

    def finish(self, status: str) -> bool:
        if self.run_id is None and self._begin is not None:
            self._begin()
        if self.run_id in self._store.deaf:
            self._store.deaf.remove(self.run_id)
            return False
        self._run()["status"] = status
        return self.run_id is not None


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    found = Store()
    monkeypatch.setattr(recording, "mlflow_tracker", lambda store, warn, run_id: FakeTracker(found, run_id))
    monkeypatch.setenv("FAKES", "{}")
    return found


def plan(directory: Path, **changes: Any) -> Plan:
    return plan_of(directory, **({"grid": GRID, "overrides": {"tracking.tracker": "mlflow"}} | changes))


def run(directory: Path, **changes: Any) -> Result:
    return run_sweep(plan(directory, **changes), resources())


def test_a_parent_and_a_run_for_each_point_have_true_statuses(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKES", json.dumps({SECOND: {"exit_code": 3}}))
    result = run(tmp_path)
    assert store.status() == {"sweep": ["FINISHED"], FIRST: ["FINISHED"], SECOND: ["FAILED"]}
    assert {row.mlflow_run_id for row in result.rows.values()} == {f"{FIRST}-0", f"{SECOND}-0"}
    assert {run["tags"][PARENT_TAG] for name in (FIRST, SECOND) for run in store.of(name)} == {"sweep-0"}
    # Started again, the sweep goes on with the run it has, and leaves those of its points alone.
    run(tmp_path)
    assert store.status() == {"sweep": ["FINISHED"], FIRST: ["FINISHED"], SECOND: ["FAILED"]}


def test_a_point_whose_sweep_was_killed_goes_on_with_its_run(tmp_path: Path, store: Store) -> None:
    plan_ = plan(tmp_path)
    with plan_.directory.claimed():
        started = plan_.directory.started_runs()
        recorder = Recorder(plan_, started, print)
        recorder.start()
        for planned in plan_.points:
            started.note(planned.name, planned.training_digest, recorder.begin(planned, None))
    assert store.status() == {"sweep": ["RUNNING"], FIRST: ["RUNNING"], SECOND: ["RUNNING"]}
    # One goes on, the other is not in the sweep any more.
    run(tmp_path, grid={"adapter.rank": [2]})
    assert store.status() == {"sweep": ["FINISHED"], FIRST: ["FINISHED"], SECOND: ["KILLED"]}
    assert plan_.directory.started_runs().open_runs() == {}


def test_a_run_that_a_changed_point_leaves_behind_is_ended(tmp_path: Path, store: Store) -> None:
    plan_ = plan(tmp_path)
    with plan_.directory.claimed():
        started = plan_.directory.started_runs()
        planned = plan_.points[0]
        started.note(
            planned.name, planned.training_digest, Recorder(plan_, started, print).begin(planned, None)
        )
    run(tmp_path, overrides={"tracking.tracker": "mlflow", "training.max_steps": 9})
    assert store.status()[FIRST] == ["KILLED", "FINISHED"]


def test_a_status_that_a_kill_kept_back_is_set(tmp_path: Path, store: Store) -> None:
    result = run(tmp_path)
    plan_ = plan(tmp_path)
    started = plan_.directory.started_runs()
    row = result.rows[FIRST]
    started.note(FIRST, row.digest, row.mlflow_run_id)
    store.runs[row.mlflow_run_id or ""]["status"] = "RUNNING"
    run(tmp_path)
    assert store.status()[FIRST] == ["FINISHED"]


def test_a_status_that_the_tracker_missed_is_set_at_the_end(tmp_path: Path, store: Store) -> None:
    store.deaf = [f"{FIRST}-0"]
    run(tmp_path)
    assert store.status()[FIRST] == ["FINISHED"]
    # Away at the end of the sweep too: the next start sets it.
    store.deaf = [f"{SECOND}-1", f"{SECOND}-1"]
    changed = {"overrides": {"tracking.tracker": "mlflow", "training.max_steps": 9}}
    run(tmp_path, **changed)
    assert store.status()[SECOND] == ["FINISHED", "RUNNING"]
    run(tmp_path, **changed)
    assert store.status()[SECOND] == ["FINISHED", "FINISHED"]


def test_with_the_tracker_away_at_first_there_is_one_run_of_each(tmp_path: Path, store: Store) -> None:
    # The parent's first attempt and the first point's first two.
    store.away = range(0, 3)
    rows = run(tmp_path).rows
    assert rows[FIRST].mlflow_run_id is None
    assert rows[SECOND].mlflow_run_id == f"{SECOND}-0"
    assert store.status() == {"sweep": ["FINISHED"], SECOND: ["FINISHED"]}


def test_a_run_begun_by_the_last_attempt_is_gone_on_with(tmp_path: Path, store: Store) -> None:
    store.away = range(1, 2)
    rows = run(tmp_path).rows
    assert rows[FIRST].mlflow_run_id == f"{FIRST}-0"
    assert store.status() == {"sweep": ["FINISHED"], FIRST: ["FINISHED"], SECOND: ["FINISHED"]}


def test_with_the_tracker_away_a_known_run_stays_the_point_s(tmp_path: Path, store: Store) -> None:
    plan_ = plan(tmp_path)
    started = plan_.directory.started_runs()
    recorder = Recorder(plan_, started, print)
    store.away = range(0, 9)
    assert recorder.begin(plan_.points[0], "known") == "known"
    assert store.runs == {}
