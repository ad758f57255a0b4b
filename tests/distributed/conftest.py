"""One start of one rank and of two, side by side, for all tests of this directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssmlora_dist.adapters.files import read_base

from ..launch.processes import finish, rank_variables
from .jobs import ROWS, ROWS_FILE, result_file, run_name

WORLD_SIZES = (1, 2)


@dataclass(frozen=True)
class Results:
    """What the ranks of `worker.py` left in a directory."""

    directory: Path

    def found(self, num_ranks: int, key: str) -> list[Any]:
        """What every rank found under `key`, by rank."""
        files = [self.directory / result_file(rank, num_ranks) for rank in range(num_ranks)]
        return [json.loads(file.read_text())[key] for file in files]

    def all_rows(self, job: str, num_ranks: int) -> list[dict[str, float]]:
        """The rows that a job logged."""
        lines = (self._run(job, num_ranks) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def rows(self, job: str, num_ranks: int) -> list[dict[str, float]]:
        """The rows of a job's training steps."""
        return [row for row in self.all_rows(job, num_ranks) if "loss" in row]

    def summary(self, job: str, num_ranks: int) -> dict[str, Any]:
        """A job's summary."""
        summary: dict[str, Any] = json.loads((self._run(job, num_ranks) / "summary.json").read_text())
        return summary

    def config(self, job: str, num_ranks: int) -> dict[str, Any]:
        """A job's configuration, as resolved."""
        config: dict[str, Any] = json.loads((self._run(job, num_ranks) / "config.json").read_text())
        return config

    def base(self, job: str, num_ranks: int) -> dict[str, Any]:
        """What the adapter that a job ended with records of its base model."""
        return read_base(self._run(job, num_ranks) / "adapter")

    def adapter(self, job: str, num_ranks: int) -> dict[str, torch.Tensor]:
        """The adapter that a job ended with."""
        return load_file(self._run(job, num_ranks) / "adapter" / "adapter_model.safetensors")

    def _run(self, job: str, num_ranks: int) -> Path:
        return self.directory / "runs" / run_name(job, num_ranks)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Starts the ranks and waits for them."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / ROWS_FILE).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    variables = [rank for num_ranks in WORLD_SIZES for rank in rank_variables(num_ranks)]
    finished = finish([["-m", "tests.distributed.worker"]] * len(variables), directory, variables)
    assert {rank.exit_code for rank in finished} == {0}, "\n".join(rank.stderr for rank in finished)
    return Results(directory)
