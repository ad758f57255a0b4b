"""Invariant I8: continued from a checkpoint, a run goes on as if it had not stopped, on any topology."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssmlora_dist.adapters.files import read_config

from ..launch.processes import finish, rank_variables
from .jobs import ROWS, ROWS_FILE
from .resume_jobs import MIDDLE, NUM_STEPS, PAIRS, PROBED, RUNS, TOPOLOGIES, continued

# Float32 sums over a few hundred tokens in another order, carried through six steps of AdamW.
LOSS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Begins all runs, then continues each of them; the numbers of ranks one after the other."""
    directory = tmp_path_factory.mktemp("resume")
    (directory / ROWS_FILE).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for phase in ("begin", "continue"):
        for num_ranks in sorted({ranks for ranks, _ in RUNS.values()}):
            worker = ["-m", "tests.distributed.resume_worker", phase]
            finished = finish([worker] * num_ranks, directory, rank_variables(num_ranks))
            assert {rank.exit_code for rank in finished} == {0}, "\n".join(rank.stderr for rank in finished)
    return directory / "runs"


def rows(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(("then", "now"), PAIRS)
def test_a_run_goes_on_where_it_stood(runs: Path, then: str, now: str) -> None:
    expected, found = rows(runs / then), rows(runs / continued(then, now))
    assert [row["step"] for row in found] == list(range(MIDDLE + 1, NUM_STEPS + 1))
    for row, before in zip(found, expected[MIDDLE:], strict=True):
        assert row["learning_rate"] == before["learning_rate"]
        assert abs(row["loss"] - before["loss"]) <= LOSS_TOLERANCE, f"step {row['step']}"


@pytest.mark.parametrize("name", RUNS)
def test_on_the_same_topology_no_bit_differs(runs: Path, name: str) -> None:
    expected, found = rows(runs / name)[MIDDLE:], rows(runs / continued(name, name))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == [row[key] for row in expected], key
    before, after = adapter(runs / name), adapter(runs / continued(name, name))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize("name", ["float16", "pp2float16"])
def test_the_loss_scale_goes_on_where_it_stood(runs: Path, name: str) -> None:
    scales = [row["loss_scale"] for row in rows(runs / name)]
    assert [row["loss_scale"] for row in rows(runs / continued(name, name))] == scales[MIDDLE:]
    assert scales[MIDDLE] != scales[0]
    assert len(set(scales[MIDDLE:])) > 1


@pytest.mark.parametrize("name", PROBED)
def test_probed_places_are_written_and_kept(runs: Path, name: str) -> None:
    for run in (runs / name, runs / continued(name, name)):
        section = json.loads((run / "config.json").read_text())["adapter"]
        assert section["placement"] == "probe"
        assert section["places"] == places(runs / name)
        written = read_config(run / "adapter")
        assert written is not None
        assert written.places == tuple(section["places"])
        # Of each place A, B and the two matrices of its state.
        assert len(adapter(run)) == 4 * len(section["places"])


def test_probed_places_do_not_depend_on_the_ranks(runs: Path) -> None:
    assert places(runs / "probed-dp1") == places(runs / "probed-zero2")


def places(run: Path) -> list[str]:
    """Those in a run's resolved configuration."""
    found: list[str] = json.loads((run / "config.json").read_text())["adapter"]["places"]
    assert {place.partition(".")[0] for place in found} == {"0", "1", "2", "3"}
    return found


def test_a_wrong_state_would_show(runs: Path) -> None:
    """Without moments, or from other parameters, the losses after the middle are others."""
    losses = [row["loss"] for row in rows(runs / "dp1")]
    assert min(abs(a - b) for a, b in pairwise(losses)) > LOSS_TOLERANCE


def test_the_checkpoint_is_of_no_topology(runs: Path) -> None:
    """The same names and shapes from every one of them, the same numbers within a tolerance."""
    files = ("adapter_model.safetensors", "optimizer.safetensors")
    for file in files:
        saved = {
            name: load_file(runs / name / "checkpoints" / f"step-{MIDDLE:08d}" / file) for name in TOPOLOGIES
        }
        for name, tensors in saved.items():
            assert tensors.keys() == saved["dp1"].keys(), name
            for key, tensor in tensors.items():
                assert tensor.shape == saved["dp1"][key].shape, f"{name}: {key}"
                # AdamW divides by the root of the second moment: what is nearly zero may differ by a step.
                assert torch.allclose(tensor, saved["dp1"][key], rtol=1e-2, atol=2e-3), f"{name}: {key}"
