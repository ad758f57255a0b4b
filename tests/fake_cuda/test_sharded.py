"""Steps through DeepSpeed's own engine on CUDA that is not there, at every ZeRO stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fake_cuda.cases import needs_compiler
from tests.fake_cuda.sharded import MICRO_BATCHES, STAGES

pytestmark = needs_compiler

ROOT = Path(__file__).parents[2]
SECONDS = 300
# How often the host waits in a micro-batch and once a step: at ZeRO 0 where loss and norm are read, beyond it
# also where DeepSpeed looks whether gradients are finite, and at ZeRO 3 where it empties its bucket.
SYNCS = {0: (0, 1), 1: (0, 4), 2: (0, 4), 3: (1, 4)}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda.sharded"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_seldom_waits(results: dict[str, dict[str, Any]], stage: int) -> None:
    of_micro_batch, of_step = SYNCS[stage]
    syncs = results[str(stage)]["syncs"]
    assert sum(times for *_, times in syncs) <= MICRO_BATCHES * of_micro_batch + of_step, syncs


def test_one_rank_is_traced_without_deepspeed_as_with_it(results: dict[str, dict[str, Any]]) -> None:
    alone, first_of_two = results["alone"], results["0"]
    assert alone["bytes"] == first_of_two["bytes"]
    assert alone["syncs"] == first_of_two["syncs"]
    for phase in ("forward", "backward", "step", "optimizer"):
        assert alone["launches"][phase] == first_of_two["launches"][phase], phase


@pytest.mark.parametrize("stage", STAGES)
def test_layers_compute_the_same_at_every_stage(results: dict[str, dict[str, Any]], stage: int) -> None:
    assert results[str(stage)]["launches"]["forward"] == results["alone"]["launches"]["forward"]
