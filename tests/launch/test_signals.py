"""Signals to real runs: what is done is saved, the run says where it stands, and goes on from there."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ..faults.harness import (
    ALONE,
    COMMON,
    NUM_STEPS,
    RUN_NAME,
    TOPOLOGIES,
    adapter,
    loss_lines,
    losses,
    newest_step,
)
from .paused_train import NUM_STEPS_BEFORE
from .processes import (
    DEBUG_TINY,
    ON_CPU,
    TIMEOUT_SECONDS,
    TRAIN_SCRIPT,
    Finished,
    finish,
    launched,
    others_in_session,
    train_command,
)
from .signal_worker import FORKED, GRACE_SECONDS, LAUNCHED, WHOLE, run_name

PLAIN = "plain"
PAUSED_SCRIPT = Path(__file__).with_name("paused_train.py")
# From a signal to the end of the process, on a busy machine.
PROMPT_SECONDS = 20.0
TERMINATED, INTERRUPTED = 128 + signal.SIGTERM, 128 + signal.SIGINT
BY_LAUNCHER = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="the launchers give every rank a GPU of its own, and there is one"
)
# How a run in processes of its own is signalled: the one that was started, or all that it has started too.
SIGNALLED: dict[str, tuple[Callable[[int, int], object], int]] = {
    PLAIN: (os.kill, signal.SIGTERM),
    "deepspeed terminated": (os.killpg, signal.SIGTERM),
    "deepspeed interrupted": (os.killpg, signal.SIGINT),
}
assert set(SIGNALLED) == {PLAIN, *LAUNCHED}


class Runs:
    """What the runs left: first those in processes of their own, then those over forked ranks.

    The latter also continue those of the launchers.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        names = list(SIGNALLED)
        first = finish(
            [_command(name) for name in names],
            directory,
            [{**ON_CPU, "GO": run_name(name) + ".go"} for name in names],
            self._signal_all,
        )
        self.finished = dict(zip(names, first, strict=True))
        self.newest = {name: newest_step(self.path(name)) for name in names}
        self.tracked_before = self.tracked()
        worker = ["-m", "tests.launch.signal_worker", "results.json"]
        plain = train_command(*_arguments(PLAIN))
        told, self.resumed = finish([worker, plain], directory, [ON_CPU, ON_CPU])
        assert told.exit_code == 0, told.stderr
        self.of: dict[str, Any] = json.loads((directory / "results.json").read_text())

    def path(self, name: str) -> Path:
        if name in SIGNALLED:
            return self.directory / "runs" / run_name(name)
        return self.directory / run_name(name) / RUN_NAME

    def tracked(self) -> list[tuple[str, str, str]]:
        with sqlite3.connect(self.directory / "runs" / "mlflow.db") as store:
            return store.execute("SELECT run_uuid, name, status FROM runs").fetchall()

    def _signal_all(self, pids: list[int]) -> None:
        for name, pid in zip(SIGNALLED, pids, strict=True):
            self._signal(name, pid)

    def _signal(self, name: str, pid: int) -> None:
        """Waits until a run pauses, signals it, lets it go on, and waits for all its processes."""
        target, signum = SIGNALLED[name]
        deadline = time.monotonic() + TIMEOUT_SECONDS / 2
        while len(loss_lines(self.path(name))) < NUM_STEPS_BEFORE and time.monotonic() < deadline:
            time.sleep(0.02)
        # The rank that writes no metrics arrives at the pause too.
        time.sleep(0.5)
        target(pid, signum)
        (self.directory / (run_name(name) + ".go")).touch()
        while others_in_session(pid) and time.monotonic() < deadline:
            time.sleep(0.02)


def topology_of(name: str) -> tuple[int, tuple[str, ...]]:
    """Number of ranks and overrides of a run that a launcher begins."""
    return TOPOLOGIES[WHOLE[LAUNCHED[name]][0]]


def _arguments(name: str) -> list[str]:
    overrides = [*COMMON, f"run.name={run_name(name)}", "run.output_dir=runs"]
    if name == PLAIN:
        overrides += ["tracking.tracker=mlflow"]
    else:
        overrides += topology_of(name)[1]
    return ["--config", str(DEBUG_TINY), "--resume", "auto", "--set", *overrides]


def _command(name: str) -> list[str]:
    if name == PLAIN:
        command = train_command(*_arguments(name))
    else:
        command = launched("deepspeed", topology_of(name)[0], *_arguments(name))
    return [str(PAUSED_SCRIPT) if part == str(TRAIN_SCRIPT) else part for part in command]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("signals"))


def own_lines(finished: Finished) -> list[str]:
    """Of what was said on the standard error stream, the last words of the ranks."""
    return [line for line in finished.stderr.splitlines() if line.startswith(("stopped", "error"))]


def stopped_line(signum: int, step: int, run: str, num_steps: int = NUM_STEPS) -> str:
    return (
        f"stopped: by {signal.Signals(signum).name} after step {step} of {num_steps}; the last good "
        f"checkpoint is {run}/checkpoints/step-{step:08d}; go on with --resume auto"
    )


def test_sigterm_under_plain_python_saves_and_says_so(runs: Runs) -> None:
    finished = runs.finished[PLAIN]
    assert finished.exit_code == TERMINATED, finished.stderr
    assert own_lines(finished) == [stopped_line(signal.SIGTERM, NUM_STEPS_BEFORE, f"runs/{PLAIN}")]
    assert "Traceback" not in finished.stderr
    assert runs.newest[PLAIN] == NUM_STEPS_BEFORE


def test_a_stopped_run_is_killed_in_mlflow_until_it_goes_on_there(runs: Runs) -> None:
    [(run_id, name, status)] = runs.tracked_before
    assert (name, status) == (PLAIN, "KILLED")
    assert runs.resumed.exit_code == 0, runs.resumed.stderr
    assert runs.tracked() == [(run_id, PLAIN, "FINISHED")]
    with sqlite3.connect(runs.directory / "runs" / "mlflow.db") as store:
        steps = store.execute("SELECT step FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
    assert steps == [(step,) for step in range(1, NUM_STEPS + 1)]


def test_under_plain_python_no_bit_differs_in_the_end(runs: Runs) -> None:
    assert losses(runs.path(PLAIN)) == losses(runs.path(ALONE))
    assert adapter(runs.path(PLAIN)) == adapter(runs.path(ALONE))


@BY_LAUNCHER
@pytest.mark.parametrize("name", LAUNCHED)
def test_a_signal_by_way_of_a_launcher_saves(runs: Runs, name: str) -> None:
    """Some of the ranks get it twice, from the launcher too."""
    finished = runs.finished[name]
    assert own_lines(finished) == [
        stopped_line(SIGNALLED[name][1], NUM_STEPS_BEFORE, f"runs/{run_name(name)}")
    ], finished.stderr
    assert runs.newest[name] == NUM_STEPS_BEFORE
    assert finished.exit_code != 0


@BY_LAUNCHER
@pytest.mark.parametrize("name", LAUNCHED)
def test_what_a_launcher_ran_goes_on(runs: Runs, name: str) -> None:
    assert {rank["exit_code"] for rank in runs.of[name]["resumed"]} == {0}, runs.of[name]
    assert losses(runs.path(name)) == losses(runs.path(LAUNCHED[name]))
    assert adapter(runs.path(name)) == adapter(runs.path(LAUNCHED[name]))


# Name -> signal, last step done, steps in all.
STOPPED = {
    "interrupted": (signal.SIGINT, 4, NUM_STEPS),
    "terminated and told so by its launcher": (signal.SIGTERM, 4, NUM_STEPS),
    "terminated in the last evaluation": (signal.SIGTERM, 6, 6),
    "one of two ranks": (signal.SIGUSR2, 4, 6),
    "one of two stages": (signal.SIGINT, 4, NUM_STEPS),
    "both of two ranks": (signal.SIGTERM, 4, NUM_STEPS),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_stops_with_all_ranks_and_a_checkpoint_of_the_step_reached(runs: Runs, name: str) -> None:
    signum, step, num_steps = STOPPED[name]
    ranks = runs.of[name]["ranks"]
    assert {rank["exit_code"] for rank in ranks} == {128 + signum}, ranks
    assert ranks[0]["stderr"].splitlines()[-1] == stopped_line(signum, step, f"../{RUN_NAME}", num_steps)
    assert [rank["stderr"] for rank in ranks[1:]] == [""] * len(ranks[1:])
    assert runs.of[name]["newest"] == step


def test_a_run_whose_output_nobody_reads_trains_on_and_stops_as_any_other(runs: Runs) -> None:
    told = runs.of["interrupted with nobody reading"]
    [rank] = told["ranks"]
    assert rank["exit_code"] == INTERRUPTED, rank["stderr"]
    assert "Traceback" not in rank["stderr"]
    assert told["newest"] == 4


def test_a_run_stopped_before_its_first_step_has_nothing_to_save(runs: Runs) -> None:
    told = runs.of["terminated before the first step"]
    [rank] = told["ranks"]
    assert rank["exit_code"] == TERMINATED
    assert rank["stderr"] == (
        f"stopped: by SIGTERM after step 0 of {NUM_STEPS}; no checkpoint has been saved; nothing was trained "
        "yet\n"
    )
    assert told["checkpoints"] == []
    assert "its run had saved no checkpoint yet: it begins anew" in told["resumed"][0]["stderr"]


def test_a_run_stopped_while_its_model_is_loaded_says_so_and_leaves_nothing(runs: Runs) -> None:
    told = runs.of["stopped while loading"]
    [rank] = told["ranks"]
    assert rank["exit_code"] == 128 + signal.SIGUSR2
    assert rank["stderr"] == "stopped: by SIGUSR2\n"
    assert told["checkpoints"] == []
    assert "warning" not in told["resumed"][0]["stderr"]


def test_sigusr1_saves_and_the_run_goes_on(runs: Runs) -> None:
    """In the middle of the second step; one that comes while the model is loaded finds nothing to save."""
    told = runs.of["told to save"]
    assert told["ranks"][0]["exit_code"] == 0, told["ranks"][0]["stderr"]
    assert "step-00000002" in told["checkpoints"]
    assert "step-00000004" not in told["checkpoints"]
    assert losses(runs.path("told to save")) == losses(runs.path(ALONE))


@pytest.mark.parametrize(
    ("name", "exit_code", "seconds"),
    [
        ("interrupted twice in a save that hangs", INTERRUPTED, 0.0),
        ("terminated in a long computation", TERMINATED, GRACE_SECONDS),
    ],
)
def test_what_does_not_end_by_itself_ends_in_time(
    runs: Runs, name: str, exit_code: int, seconds: float
) -> None:
    told = runs.of[name]
    [rank] = told["ranks"]
    assert rank["exit_code"] == exit_code, rank["stderr"]
    [signalled_at] = [float(line) for line in rank["stdout"].splitlines() if re.fullmatch(r"[\d.]+", line)]
    assert seconds <= rank["ended_at"] - signalled_at < seconds + PROMPT_SECONDS
    # The one before.
    assert told["newest"] == 3
    said = "error: not ready to stop 1 seconds after SIGTERM (checkpoint.grace_seconds); the last complete "
    assert (rank["stderr"].splitlines()[-1].startswith(said)) == (seconds > 0)


@pytest.mark.parametrize("name", FORKED)
def test_a_stopped_run_goes_on_as_if_it_had_not(runs: Runs, name: str) -> None:
    resumed = runs.of[name]["resumed"]
    assert {rank["exit_code"] for rank in resumed} == {0}, resumed
    whole = FORKED[name].whole
    assert losses(runs.path(name)) == losses(runs.path(whole))
    assert adapter(runs.path(name)) == adapter(runs.path(whole))
