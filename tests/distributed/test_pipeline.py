"""Invariant I3: stages, wherever they are cut, train what one device trains, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ..launch.processes import finish, rank_variables
from ..tiny import tiny_model
from .jobs import ROWS, ROWS_FILE
from .pipeline_jobs import (
    JOBS,
    NEAR,
    NUM_LAYERS,
    NUM_STEPS,
    PLAIN,
    SEQUENCE,
    SPLIT,
    TIED_DIRECTORY,
    VARIANTS,
    directory_name,
)

# Float32 sums over a few hundred tokens in another order, carried through twenty steps of AdamW.
LOSS_TOLERANCE = 1e-4
SEQUENCE_EVALUATED = ("one key-value head", "shared rows of one key-value head")
ADAPTER_TOLERANCE = 2e-3


class Trained:
    """What the jobs left in their run directories."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def rows(self, job: str) -> list[dict[str, float]]:
        """The rows of a job's training steps."""
        lines = (self._runs / directory_name(job) / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    def evaluation(self, job: str) -> dict[str, Any]:
        """A job's evaluation before and after training."""
        summary: dict[str, Any] = json.loads((self._runs / directory_name(job) / "summary.json").read_text())
        evaluation: dict[str, Any] = summary["evaluation"]
        return evaluation

    def adapter(self, job: str) -> dict[str, torch.Tensor]:
        """The adapter that a job ended with."""
        return load_file(self._runs / directory_name(job) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Starts one, two, three and four ranks, one number after the other."""
    directory = tmp_path_factory.mktemp("stages")
    (directory / ROWS_FILE).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = {"vocab_size": 259, "max_position_embeddings": 512, "pad_token_id": 258}
    tiny_model(num_layers=NUM_LAYERS, **sizes, tie_word_embeddings=True).save_pretrained(
        directory / TIED_DIRECTORY
    )
    for num_ranks in sorted({ranks for ranks, _ in JOBS.values()}):
        worker = ["-m", "tests.distributed.pipeline_worker"]
        finished = finish([worker] * num_ranks, directory, rank_variables(num_ranks))
        assert {rank.exit_code for rank in finished} == {0}, "\n".join(rank.stderr for rank in finished)
    return Trained(directory / "runs")


@pytest.mark.parametrize("job", SPLIT)
def test_stages_change_no_bit(trained: Trained, job: str) -> None:
    reference = SPLIT[job][2]
    rows, expected = trained.rows(job), trained.rows(reference)
    assert len(rows) == (NUM_STEPS if reference in VARIANTS else 6)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows] == [row[key] for row in expected], key
    adapter, expected_adapter = trained.adapter(job), trained.adapter(reference)
    assert adapter.keys() == expected_adapter.keys()
    assert [name for name in adapter if not torch.equal(adapter[name], expected_adapter[name])] == []


@pytest.mark.parametrize("job", [*NEAR, *SEQUENCE])
def test_other_sums_stay_near(trained: Trained, job: str) -> None:
    """Invariants I3 at ZeRO 1 and I7."""
    reference = {**NEAR, **SEQUENCE}[job][2]
    for row, expected in zip(trained.rows(job), trained.rows(reference), strict=True):
        assert abs(row["loss"] - expected["loss"]) <= LOSS_TOLERANCE, f"step {row['step']}"
    adapter, expected_adapter = trained.adapter(job), trained.adapter(reference)
    assert adapter.keys() == expected_adapter.keys()
    for name, tensor in adapter.items():
        error = (tensor - expected_adapter[name]).abs().max().item()
        assert error <= ADAPTER_TOLERANCE, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("job", ["nf4", "experts"])
def test_evaluation_gives_the_same_scores_in_stages(trained: Trained, job: str) -> None:
    assert trained.evaluation(f"{job} in stages") == trained.evaluation(job)


def test_evaluation_gives_the_same_scores_of_shared_rows(trained: Trained) -> None:
    alone, shared = (trained.evaluation(job) for job in SEQUENCE_EVALUATED)
    for moment in ("before", "after"):
        for length, score in alone[moment].items():
            found = shared[moment][length]
            assert found["num_examples"] == score["num_examples"]
            assert found["exact_match"] == score["exact_match"]
            assert found["loss"] == pytest.approx(score["loss"], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("job", PLAIN)
def test_clipping_is_active(trained: Trained, job: str) -> None:
    """Otherwise the norm over stages would not be seen in the losses."""
    norms = [row["grad_norm"] for row in trained.rows(job)]
    assert sum(norm > 0.25 for norm in norms) >= len(norms) // 2
