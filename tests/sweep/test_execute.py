"""The sweep's side of points: their processes are the fakes, which compute nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.errors import CheckpointError, DataError
from ssmlora_dist.sweep.execute import Result, run_sweep
from ssmlora_dist.sweep.measures import measures
from ssmlora_dist.sweep.process import MARK, command

from .sweeps import plan_of, resources, write_sweep

ROOT = Path(__file__).parents[2]
SEED = 20261123
# Many times what anything here takes on busy cores.
TIMEOUT_SECONDS = 120.0
FIRST, SECOND, THIRD, FOURTH = (
    f"{method}_rank-{rank}_seed-0" for method in ("ssmlora", "lora") for rank in (2, 4)
)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what the processes of points do, by the point's name."""

    def set_fakes(points: dict[str, Any]) -> None:
        monkeypatch.setenv("FAKES", json.dumps(points))

    set_fakes({})
    return set_fakes


def run(directory: Path, devices: tuple[str, ...] = (), retry_failed: bool = False, **changes: Any) -> Result:
    return run_sweep(plan_of(directory, **changes), resources(devices), retry_failed=retry_failed)


def sweep_directory(directory: Path) -> Path:
    return directory / "sweeps" / "sweep"


def starts(directory: Path) -> list[dict[str, Any]]:
    file = sweep_directory(directory) / "starts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def outcomes(result: Result) -> dict[str, str]:
    return {name: row.outcome for name, row in result.rows.items()}


def recorded(directory: Path) -> dict[str, dict[str, Any]]:
    lines = (sweep_directory(directory) / "points.jsonl").read_text().splitlines()
    return {row["point"]: row for row in map(json.loads, lines)}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_point_is_run_once_and_has_a_row(tmp_path: Path, fakes: Any) -> None:
    plan = plan_of(tmp_path)
    result = run_sweep(plan, resources())
    assert list(result.rows) == [FIRST, SECOND, THIRD, FOURTH]
    assert [start["point"] for start in starts(tmp_path)] == list(result.rows)
    assert result.num_finished == 4
    row = recorded(tmp_path)[FOURTH]
    assert row["overrides"] == {"adapter.method": "lora", "adapter.rank": 4}
    assert (row["group"], row["seed"], row["outcome"]) == ("lora_rank-4", 0, "finished")
    assert (row["reason"], row["exit_code"], row["mlflow_run_id"]) == (None, 0, None)
    assert row["digest"] == plan.points[3].digest
    assert row["wall_seconds"] > 0
    assert row["metrics"] == {
        "final_loss": 1.0,
        "tokens_per_second": 200.0,
        "tokens_per_second_per_device": 100.0,
        "num_trainable_parameters": 7.0,
        "peak_memory_gib": 2.0,
        "num_ranks": 2.0,
        "step_seconds": 3.0,
        "validation_loss_after": 0.5,
        "validation_exact_match_after": 0.25,
        "validation_exact_match_after/64": 0.25,
    }
    assert json.loads((sweep_directory(tmp_path) / "sweep.json").read_text())["name"] == "sweep"
    assert "hello from" in (sweep_directory(tmp_path) / "logs" / f"{FIRST}.log").read_text()
    assert (sweep_directory(tmp_path) / "report" / "report.html").exists()


def test_a_finished_sweep_runs_nothing_again(tmp_path: Path, fakes: Any) -> None:
    first = run(tmp_path)
    assert run(tmp_path).rows == first.rows
    assert len(starts(tmp_path)) == 4


def test_tasks_are_answered_after_training(tmp_path: Path, fakes: Any) -> None:
    changes = {"overrides": {"evaluation.tasks": [{"task": "passkey"}]}, "evaluate_tasks": True}
    grid = {"adapter.rank": [2]}
    result = run(tmp_path, grid=grid, **changes)
    (row,) = result.rows.values()
    scores = {name: value for name, value in row.metrics.items() if name.startswith("task/")}
    assert scores == {"task/passkey": 0.5, "task/passkey/64": 0.75, "task/passkey/64/0.5": 1.0}
    # Other tasks need no other training.
    changes["overrides"] = {"evaluation.tasks": [{"task": "passkey", "num_examples": 3}]}
    assert run(tmp_path, grid=grid, **changes).rows[row.point].digest != row.digest
    assert len(starts(tmp_path)) == 1


def test_what_goes_wrong_is_an_outcome_with_its_reason(tmp_path: Path, fakes: Any) -> None:
    fakes(
        {
            FIRST: {"exit_code": 1, "says": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"},
            SECOND: {"exit_code": 3, "says": "error: step 2: loss or gradients were not finite"},
            THIRD: {"kills_itself": int(signal.SIGKILL)},
        }
    )
    result = run(tmp_path)
    assert list(outcomes(result).values()) == ["out_of_memory", "failed", "failed", "finished"]
    reasons = [row.reason or "" for row in result.rows.values()]
    assert reasons[0] == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
    assert reasons[1].startswith("diverged: step 2")
    assert reasons[2].startswith("killed by SIGKILL (exit code -9)")
    assert [row["exit_code"] for row in recorded(tmp_path).values()] == [1, 3, -9, 0]
    # These are outcomes: they stay, until they are asked for.
    assert outcomes(run(tmp_path)) == outcomes(result)
    assert len(starts(tmp_path)) == 4
    fakes({})
    assert run(tmp_path, retry_failed=True).num_finished == 4
    assert len(starts(tmp_path)) == 7


def test_an_exit_without_a_result_is_a_failure(tmp_path: Path, fakes: Any) -> None:
    fakes({FIRST: {"exit_code": 0}})
    row = run(tmp_path).rows[FIRST]
    assert row.outcome == "failed"
    assert "summary.json: cannot be read" in (row.reason or "")


@pytest.mark.parametrize(
    "summary", ["", "[]", '{"num_steps": 2}', '{"peak_memory_gib": 3}', '{"evaluation": {"after": 3}}']
)
def test_a_result_that_cannot_be_read_is_a_failure(tmp_path: Path, summary: str) -> None:
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(DataError, match=r"summary\.json: .*--retry-failed"):
        measures(tmp_path, with_tasks=False)


def test_a_point_that_takes_too_long_is_stopped_and_failed(tmp_path: Path, fakes: Any) -> None:
    fakes({FIRST: {"steps": 10_000, "step_seconds": 0.05}})
    result = run(tmp_path, timeout_seconds=3.0)
    assert outcomes(result)[FIRST] == "failed"
    assert (result.rows[FIRST].reason or "").startswith(
        "took longer than timeout_seconds (3): by SIGTERM after step"
    )
    assert result.num_finished == 3


def test_a_changed_point_is_run_again_and_what_it_had_is_kept(tmp_path: Path, fakes: Any) -> None:
    run(tmp_path)
    before = recorded(tmp_path)
    grid = {"method": {"ssmlora": {}, "lora": {"adapter.method": "lora", "adapter.alpha": 5}}}
    run(tmp_path, grid={**grid, "adapter.rank": [2]})
    assert [start["point"] for start in starts(tmp_path)[4:]] == [THIRD]
    after = recorded(tmp_path)
    assert list(after) == [FIRST, THIRD]
    assert after[FIRST] == before[FIRST]
    assert after[THIRD]["digest"] != before[THIRD]["digest"]
    aside = sweep_directory(tmp_path) / "aside"
    assert (aside / f"{THIRD}-1" / "summary.json").exists()
    kept = [json.loads(line) for line in (aside / "points.jsonl").read_text().splitlines()]
    assert kept == [before[SECOND], before[FOURTH], before[THIRD]]
    # Back in the plan, it is there already.
    run(tmp_path, grid={**grid, "adapter.rank": [2, 4]})
    assert [start["point"] for start in starts(tmp_path)[5:]] == [FOURTH]


def span(directory: Path, start: dict[str, Any]) -> tuple[float, float]:
    """When a point began and ended."""
    summary = sweep_directory(directory) / "runs" / start["point"] / "summary.json"
    return start["at"], summary.stat().st_mtime


def overlaps(directory: Path) -> list[set[str]]:
    """Pairs of points that ran at the same time."""
    found = [(start, *span(directory, start)) for start in starts(directory)]
    return [
        {one["point"], other["point"]}
        for index, (one, one_began, one_ended) in enumerate(found)
        for other, other_began, other_ended in found[index + 1 :]
        if other_began < one_ended and one_began < other_ended
    ]


# The first begins before the second ends, and runs until all the others are done.
SIDE_BY_SIDE = {FIRST: {"until": f"runs/{FOURTH}/summary.json"}, SECOND: {"until": f"runs/{FIRST}"}}


def test_points_run_side_by_side_as_configured(tmp_path: Path, fakes: Any, monkeypatch: Any) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    fakes(SIDE_BY_SIDE)
    run_sweep(plan_of(tmp_path, launcher={"points_at_once": 2}), resources(num_cpus=6))
    assert {FIRST, SECOND} in overlaps(tmp_path)
    assert all(FIRST in pair for pair in overlaps(tmp_path))
    assert {start["threads"] for start in starts(tmp_path)} == {"3"}


def test_by_default_points_run_one_after_another_on_a_cpu(tmp_path: Path, fakes: Any) -> None:
    run(tmp_path)
    assert overlaps(tmp_path) == []


def test_on_cuda_points_side_by_side_have_devices_of_their_own(tmp_path: Path, fakes: Any) -> None:
    fakes(SIDE_BY_SIDE)
    run(tmp_path, devices=("4", "7"))
    devices = {start["point"]: start["devices"] for start in starts(tmp_path)}
    assert set(devices.values()) == {"4", "7"}
    assert {FIRST, SECOND} in overlaps(tmp_path)
    assert all(len({devices[point] for point in pair}) == 2 for pair in overlaps(tmp_path))


def test_several_ranks_are_started_by_the_launcher() -> None:
    script = Path("train.py")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", "7"]
    on_cpu = command(script, ["a"], ranks=2, port=7, on_cuda=False)
    assert on_cpu == [*launcher, "--num_accelerators", "2", "train.py", "a"]
    assert command(script, ["a"], ranks=2, port=7, on_cuda=True) == [*launcher, "train.py", "a"]
    assert command(script, ["a"], ranks=1, port=7, on_cuda=True) == [sys.executable, "train.py", "a"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_sweep_and_it_goes_on(tmp_path: Path, fakes: Any, signum: int) -> None:
    fakes({SECOND: {"steps": 60, "step_seconds": 0.05}})

    def stop() -> None:
        metrics = sweep_directory(tmp_path) / "runs" / SECOND / "metrics.jsonl"
        until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
        os.kill(os.getpid(), signum)

    thread = threading.Thread(target=stop)
    thread.start()
    result = run(tmp_path)
    thread.join()
    assert result.stopped_by == signum
    assert list(outcomes(result).values()) == ["finished", "stopped", "not_run", "not_run"]
    stopped = recorded(tmp_path)[SECOND]
    assert stopped["exit_code"] == 143
    assert stopped["reason"].startswith(f"stopped by {signal.Signals(signum).name}: by SIGTERM after step")
    again = run(tmp_path)
    assert again.num_finished == 4
    assert again.stopped_by is None
    assert Counter(start["point"] for start in starts(tmp_path)) == {
        FIRST: 1,
        SECOND: 2,
        THIRD: 1,
        FOURTH: 1,
    }
    assert (again.rows[SECOND].wall_seconds or 0) > stopped["wall_seconds"]
    assert steps_of(tmp_path, SECOND) == list(range(1, 61))


def steps_of(directory: Path, point: str) -> list[int]:
    lines = (sweep_directory(directory) / "runs" / point / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def has_started(directory: Path, number: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether more than `number` points were started, or nothing more will be."""
    return len(starts(directory)) > number or process.poll() is not None


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "wall_seconds"} for row in rows]


def test_killed_at_random_moments_the_table_is_the_same(tmp_path: Path, fakes: Any) -> None:
    """No step of a point is done twice, and none of its processes outlives the next sweep's start."""
    behaviour = {
        FIRST: {"steps": 30, "step_seconds": 0.1},
        SECOND: {"exit_code": 3, "says": "error: made to fail"},
        THIRD: {"steps": 30, "step_seconds": 0.1},
        FOURTH: {"steps": 10, "step_seconds": 0.1},
    }
    fakes(behaviour)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    run(whole)
    sweep = write_sweep(broken)
    arguments = [sys.executable, "-m", "tests.sweep.run_fakes", str(sweep)]
    generator = random.Random(SEED)
    print("seed", SEED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for number in range(3):
        process = subprocess.Popen(arguments, env=environment, cwd=ROOT, start_new_session=True)
        until(partial(has_started, broken, number, process))
        time.sleep(generator.uniform(0, 2))
        process.kill()
        process.wait()
    done = subprocess.run(
        arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows == list(recorded(broken).values())
    assert without_times(rows) == without_times(list(recorded(whole).values()))
    for point in (FIRST, THIRD, FOURTH):
        assert steps_of(broken, point) == list(range(1, behaviour[point]["steps"] + 1))
    mark = f"{MARK}={sweep_directory(broken)}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                assert mark not in (entry / "environ").read_bytes()
            except OSError:
                continue


def test_an_outcome_that_a_kill_kept_from_its_row_is_found(tmp_path: Path, fakes: Any) -> None:
    run(tmp_path)
    file = sweep_directory(tmp_path) / "points.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[1:]))
    again = run(tmp_path)
    assert again.num_finished == 4
    assert again.rows[FIRST].wall_seconds == 0.01
    assert len(starts(tmp_path)) == 4


def test_a_broken_row_is_refused_before_anything_runs(tmp_path: Path, fakes: Any) -> None:
    run(tmp_path)
    file = sweep_directory(tmp_path) / "points.jsonl"
    content = file.read_text() + "{}\n"
    file.write_text(content)
    with pytest.raises(DataError, match=r"(?s)points\.jsonl: 1 broken row.*line 5: "):
        run(tmp_path, seeds=[1])
    assert file.read_text() == content
    assert len(starts(tmp_path)) == 4


def test_a_sweep_that_runs_already_is_not_run_beside_itself(tmp_path: Path, fakes: Any) -> None:
    plan = plan_of(tmp_path)
    with plan.directory.claimed(), pytest.raises(CheckpointError, match="another sweep is using it"):
        run_sweep(plan, resources())
    assert starts(tmp_path) == []
