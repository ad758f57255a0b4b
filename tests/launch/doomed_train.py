"""`launch/train.py`, of which one rank ends in mid-training: `DOOMED=RANK:SIGNAL doomed_train.py ...`."""

from __future__ import annotations

import os
import runpy
import sys
import threading
import time
from pathlib import Path

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"
LONG = (
    "training.max_steps=1000000",
    "training.global_batch_size=2",
    "data.validation=null",
    "evaluation.every_steps=null",
)
RUN = "lost"
METRICS = Path("runs") / RUN / "metrics.jsonl"
NUM_STEPS_BEFORE = 3


def end_in_training(signum: int) -> None:
    """Sends this process a signal after a few steps."""
    while not METRICS.exists() or METRICS.read_text().count('"loss"') < NUM_STEPS_BEFORE:
        time.sleep(0.05)
    print(time.monotonic(), flush=True)
    os.kill(os.getpid(), signum)


def train(arguments: list[str]) -> None:
    """Runs the script as the command line would, for longer than any test."""
    rank, signum = map(int, os.environ["DOOMED"].split(":"))
    if int(os.environ["RANK"]) == rank:
        threading.Thread(target=end_in_training, args=[signum], daemon=True).start()
    sys.argv = [str(TRAIN_SCRIPT), *arguments, "--set", f"run.name={RUN}", *LONG]
    runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")


if __name__ == "__main__":
    train(sys.argv[1:])
