"""`launch/evaluate.py`: what it writes and shows, how it goes on after a kill, what it refuses."""

from __future__ import annotations

import json
import random
import re
import signal
import sqlite3
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.evaluation.item_rows import PARTS_DIRECTORY, RESULTS_FILE
from ssmlora_dist.evaluation.statistics import estimate
from ssmlora_dist.tracking import RunDirectory

from .conftest import ON_CPU
from .evaluation_cases import (
    BAD,
    CAPITALS,
    COLOURS,
    CONFIG_FILE,
    DEPTHS,
    EVALUATE_SCRIPT,
    LENGTHS,
    NUM_COLOURS,
    NUM_COLOURS_FAILED,
    NUM_EXAMPLES,
    prepare,
)
from .evaluation_worker import KILLED, ROUNDS
from .processes import Finished, finish, free_port

BASE, ADAPTER = MODELS = ("base", "adapter")
TASKS = ("passkey", "colours", "capitals")
NUM_KEYS = len(LENGTHS) * NUM_EXAMPLES
# The killed evaluation has written fewer than half of its batches of both models.
MOST_BATCHES = 8
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Evaluations:
    """What the commands left in a directory; `two` are the ranks of one evaluation."""

    directory: Path
    finished: dict[str, Finished]
    two: list[Finished]
    part_of_killed: bytes

    def rows(self, out: str, model: str) -> list[dict[str, Any]]:
        content = (self.directory / out / model / RESULTS_FILE).read_text()
        return [json.loads(line) for line in content.splitlines()]

    def results(self, out: str) -> dict[str, bytes]:
        """The result files by model."""
        found = self.directory / out
        return {file.parent.name: file.read_bytes() for file in found.glob(f"*/{RESULTS_FILE}")}

    def table(self, out: str) -> list[list[str]]:
        heading, _, *lines = (self.directory / out / "table.md").read_text().splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in (heading, *lines)]


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Evaluations:
    """Runs all commands: most over forked processes, one on two ranks in processes of their own."""
    directory, aside = tmp_path_factory.mktemp("evaluate"), tmp_path_factory.mktemp("aside")
    prepare(directory)
    (directory / "two-ranks").mkdir()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    worker = [sys.executable, "-m", "tests.launch.evaluation_worker", str(aside / "results.json")]
    worker += [str(draw.randint(1, MOST_BATCHES)), str(draw.random())]
    tracked = ["--config", f"../{CONFIG_FILE}", "--adapter", "../first/adapter", "--out", "../two"]
    tracked += ["--set", "tracking.tracker=mlflow", "tracking.experiment=evaluations"]
    launch = {**ON_CPU, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    told, *two = finish(
        [worker, *[[sys.executable, str(EVALUATE_SCRIPT), *tracked]] * 2],
        directory / "two-ranks",
        [{**ON_CPU, "WORKING": ".."}, *({**launch, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2))],
    )
    assert told.exit_code == 0, told.stderr
    found = json.loads((aside / "results.json").read_text())
    finished = {
        name: Finished(rank["exit_code"], rank["stdout"], rank["stderr"]) for name, rank in found.items()
    }
    return Evaluations(directory, finished, two, b"")
