"""Training that loses a rank: the others stop at once with exit code 3 and a message that names it."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from .doomed_train import RUN
from .lost_worker import EVERY_STEP, LOST, SILENCE_SECONDS
from .processes import DEBUG_TINY, ON_CPU, TRAIN_SCRIPT, Finished, finish, launched

DOOMED_SCRIPT = Path(__file__).with_name("doomed_train.py")
# On a busy machine; the timeout of the runs is 1,800 seconds.
PROMPT_SECONDS = 20.0


class Losses:
    """What the runs left in their directories."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        worker = ["-m", "tests.launch.lost_worker", "results.json"]
        self.finished, self.launched = finish(
            [worker, _doomed("deepspeed")],
            directory,
            [ON_CPU, {**ON_CPU, "DOOMED": f"1:{int(signal.SIGKILL)}"}],
        )
        assert self.finished.exit_code == 0, self.finished.stderr
        self.ranks: dict[str, list[dict[str, Any]]] = json.loads((directory / "results.json").read_text())


def _doomed(launcher: str) -> list[str]:
    command = launched(launcher, 2, "--config", str(DEBUG_TINY))
    return [str(DOOMED_SCRIPT) if part == str(TRAIN_SCRIPT) else part for part in command]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    return Losses(tmp_path_factory.mktemp("lost"))


@pytest.mark.parametrize("name", LOST)
def test_the_other_rank_stops_with_3_and_names_it(losses: Losses, name: str) -> None:
    victim, signum, _ = LOST[name]
    lost, other = losses.ranks[name][victim], losses.ranks[name][1 - victim]
    stopped = signum == signal.SIGSTOP
    # Continued afterwards, a stopped one ends too, and leaves the message to the other.
    assert lost["exit_code"] == (3 if stopped else -signum)
    assert lost["stderr"] == ""
    assert other["exit_code"] == 3
    assert other["stderr"].count("\n") == 1, other["stderr"]
    place = " on rank 1" if victim == 0 else ""
    fate = f"has given no sign for {SILENCE_SECONDS} seconds" if stopped else "died without a word"
    begins = rf"error{place}: rank {victim} \(host \S+, process \d+\) {fate}: "
    assert re.match(begins, other["stderr"]), other["stderr"]
    [died_at] = re.findall(r"^[\d.]+$", lost["stdout"], flags=re.MULTILINE)
    assert other["ended_at"] - float(died_at) < PROMPT_SECONDS


@pytest.mark.parametrize("name", LOST)
def test_the_message_ends_with_the_last_good_checkpoint(losses: Losses, name: str) -> None:
    victim, _, overrides = LOST[name]
    end = losses.ranks[name][1 - victim]["stderr"].rpartition("The run has stopped; ")[2].rstrip()
    if EVERY_STEP not in overrides:
        assert end == "no checkpoint had been written"
        return
    checkpoint = end.removeprefix("the last good checkpoint is ")
    assert checkpoint.startswith(f"runs/{RUN}/checkpoints/step-")
    assert (losses.directory / name.replace(" ", "_") / checkpoint / "manifest.json").exists()


@pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="the launcher gives every rank a GPU of its own, and there is one"
)
def test_under_the_launcher_too(losses: Losses) -> None:
    """Its signal comes in a second: neither the message nor the end of the tracked run are lost."""
    finished: Finished = losses.launched
    # Of the rank that was killed: -9.
    assert finished.exit_code == 256 - signal.SIGKILL, finished.stderr
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1, finished.stderr
    assert re.match(r"error: rank 1 \(host \S+, process \d+\) died without a word: ", errors[0])
    assert "Traceback" not in finished.stderr
    with sqlite3.connect(losses.directory / "runs" / "mlflow.db") as store:
        assert store.execute("SELECT name, status FROM runs").fetchall() == [(RUN, "FAILED")]
