"""`launch/train.py` that waits before its fifth step until there is a file of the name in `GO`."""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from tests.faults.moments import at

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "train.py"
NUM_STEPS_BEFORE = 4


def wait() -> None:
    while not Path(os.environ["GO"]).exists():
        time.sleep(0.02)


if __name__ == "__main__":
    at("step", NUM_STEPS_BEFORE + 1, wait)
    sys.argv[0] = str(TRAIN_SCRIPT)
    runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")
