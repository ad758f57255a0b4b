"""Training on two ranks, of which one is lost: `python -m tests.launch.lost_worker RESULTS`."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

from .doomed_train import train
from .forking import run_side_by_side
from .processes import DEBUG_TINY, rank_variables

ZERO_3, STAGES = "parallel.zero_stage=3", "parallel.pipeline_stages=2"
EVERY_STEP, NEVER = "checkpoint.every_steps=1", "checkpoint.every_steps=null"

SILENCE_SECONDS = 6

# Name -> (lost rank, how, overrides).
LOST: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "two stages, rank 1 stopped": (
        1,
        signal.SIGSTOP,
        (STAGES, f"parallel.timeout_seconds={2 * SILENCE_SECONDS}"),
    ),
    "zero 0 without rank 1": (1, signal.SIGKILL, (NEVER,)),
    "zero 0 without rank 0": (0, signal.SIGKILL, (NEVER,)),
    "zero 3 without rank 1": (1, signal.SIGKILL, (ZERO_3, EVERY_STEP)),
    "zero 3 without rank 0": (0, signal.SIGKILL, (ZERO_3, EVERY_STEP)),
    "two stages without rank 1": (1, signal.SIGKILL, (STAGES, EVERY_STEP)),
    "two stages without rank 0": (0, signal.SIGKILL, (STAGES, NEVER)),
}


def rank_of(name: str, variables: dict[str, str]) -> int:
    """One rank of a case; its exit code."""
    victim, signum, overrides = LOST[name]
    os.environ.update(variables, DOOMED=f"{victim}:{int(signum)}")
    train(["--config", str(DEBUG_TINY), "--set", "tracking.tracker=none", *overrides])
    return 0


def main() -> None:
    runs = {name: [partial(rank_of, name, variables) for variables in rank_variables(2)] for name in LOST}
    Path(sys.argv[1]).write_text(json.dumps(run_side_by_side(runs, Path.cwd(), num_at_once=2)))


if __name__ == "__main__":
    main()
