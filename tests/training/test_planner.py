"""What runs are planned to take, and which settings are proposed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import topology_problems
from ssmlora_dist.fake_cuda.step import trace_step
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.training.planner import (
    CONTEXT_BYTES,
    DEVICES,
    GIB,
    Planner,
    changes,
    device_of,
    estimate_text,
    planned_text,
    settle_memory,
)
from tests.decoders import bare_config
from tests.fake_cuda.cases import needs_compiler

ROOT = Path(__file__).parents[2]


def config_of(shapes: dict[str, Any], world_size: int = 1, **values: Any) -> RunConfig:
    given = {
        "model.path": None,
        "model.init": "random",
        "model.tokenizer": "bytes",
        "model.compute_dtype": "bfloat16",
        "model.config": shapes,
        "adapter.every_layer": [],
        "adapter.dropout": 0,
        **{name.replace("__", "."): value for name, value in values.items()},
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    path = ROOT / "configs" / "llama_ssmlora.json"
    return load_config(path, overrides, world_size=world_size, check_files=False)


def test_kinds_of_memory_follow_the_settings() -> None:
    def memory(num_devices: int = 8, **values: Any) -> Any:
        config = config_of(SHAPES["llama3-8b"], num_devices, **values)
        return Planner(config, num_devices, 80).plan(config).memory

    plain = memory()
    # 4-bit projections with their scales, and embedding and head in 16 bits.
    assert plain.backbone == pytest.approx(5.31 * GIB, rel=0.01)
    assert plain.adapters == plain.optimizer > 0
    assert plain.communication == plain.host == 0
    assert plain.reserve == CONTEXT_BYTES + int(0.05 * 80 * GIB)
    sharded = memory(parallel__zero_stage=1)
    assert sharded.optimizer == plain.optimizer // 8
    assert sharded.communication > 0
    whole = memory(parallel__zero_stage=3)
    assert plain.backbone / 8 < whole.backbone < plain.backbone / 4
    stepped_on_host = memory(parallel__zero_stage=1, parallel__offload_optimizer=True)
    assert (stepped_on_host.optimizer, stepped_on_host.host) == (0, sharded.optimizer)
    offloaded = memory(training__offload_checkpoints=True)
    assert offloaded.host > 0.9 * (plain.checkpoints - offloaded.checkpoints) > 0
    shared = memory(parallel__sequence_parallel=8)
    assert shared.checkpoints * 8 == pytest.approx(plain.checkpoints, rel=0.01)
    staged = memory(parallel__pipeline_stages=4)
    assert staged.backbone < 0.5 * plain.backbone


def test_time_counts_the_work_of_a_rank() -> None:
    def seconds(num_devices: int = 8, **values: Any) -> float:
        config = config_of(SHAPES["llama3-8b"], num_devices, **values)
        return Planner(config, num_devices, 80).plan(config).seconds

    one = seconds(1)
    assert seconds(8) == pytest.approx(one / 8)
    # 8.03e9 weights less the embedding's, 6 FLOPs each a token, of 32 x 1,024 tokens, at 989 TFLOP/s.
    assert one > 6 * 7.5e9 * 32 * 1024 / 989e12
    assert seconds(1, training__gradient_checkpointing=False) < 0.8 * one
    # Eight micro-batches of one row go through four stages in eleven turns.
    assert seconds(4, parallel__pipeline_stages=4) > 11 / 8 * one / 4


def test_what_is_proposed_fits_keeps_to_the_rules_and_is_as_fast_as_any() -> None:
    config = config_of(SHAPES["llama2-70b"], data__max_length=4096)
    for num_devices, memory_gib in ((1, 80), (8, 24), (8, 80)):
        planner = Planner(config, num_devices, memory_gib)
        best = planner.best()
        assert best is not None
        assert planner.fits(best)
        assert topology_problems(best.config, world_size=num_devices, device_type="cuda") == []
        as_configured = planner.plan(config)
        assert not planner.fits(as_configured) or best.seconds <= as_configured.seconds
    alone = Planner(config, 1, 24)
    assert alone.best() is None
    text, fits = estimate_text(alone)
    assert not fits
    assert "nothing fits: shorten data.max_length" in text


def test_host_memory_is_a_limit_too() -> None:
    config = config_of(
        SHAPES["llama3-8b"],
        data__max_length=131072,
        training__global_batch_size=8,
        training__micro_batch_size=1,
    )
    long = Planner(config, 1, 24)
    best = long.best()
    assert best is not None
    assert best.config.training.offload_checkpoints
    assert Planner(config, 1, 24, host_memory_gib=16).best() is None


def test_the_longest_rows_of_an_8b_model_on_80_gib() -> None:
    """75 GiB of allocations: 200k tokens without and 512k with checkpoints in host memory, at least."""
    planner = Planner(config_of(SHAPES["llama3-8b"]), 1, 80)
    assert planner.longest_rows(offload=False)[0] >= 200_000
    longest, settings = planner.longest_rows(offload=True)
    assert longest >= 512_000
    held = planner.plan(settings.model_copy(), longest)
    assert planner.fits(held)
    assert not planner.fits(planner.plan(settings, longest + 1024))


def test_the_proposal_is_what_set_takes() -> None:
    config = config_of(SHAPES["llama3-8b"], data__max_length=16384)
    planner = Planner(config, 8, 24)
    best = planner.best()
    assert best is not None
    again = load_config(
        ROOT / "configs" / "llama_ssmlora.json",
        [
            "model.path=null",
            "model.init=random",
            "model.tokenizer=bytes",
            "model.compute_dtype=bfloat16",
            f"model.config={json.dumps(SHAPES['llama3-8b'])}",
            "adapter.every_layer=[]",
            "adapter.dropout=0",
            "data.max_length=16384",
            *changes(config, best.config),
        ],
        world_size=8,
        check_files=False,
    )
    assert again.training == best.config.training
    assert again.parallel == best.config.parallel


def test_auto_takes_what_costs_least_time_and_fits() -> None:
    auto = {
        "training__mlp_tile_size": "auto",
        "training__layers_per_checkpoint": "auto",
        "training__offload_checkpoints": "auto",
        "training__micro_batch_size": 1,
    }

    def chosen(memory_gib: float, shapes: Any = SHAPES["llama3-8b"], **values: Any) -> tuple[Any, str]:
        config = config_of(shapes, data__max_length=65536, **(auto | values))
        settled, line = settle_memory(config, 1, memory_gib * GIB)
        assert not settled.training.is_unsettled
        return settled.training.spared, line

    found, line = chosen(75)
    assert found == (1, False, None)
    assert line.startswith("training.layers_per_checkpoint 1, training.offload_checkpoints false, ")
    assert "where 75.00 GiB may be held)" in line
    assert chosen(30)[0] == (1, False, 4096)
    assert chosen(22)[0] == (2, False, 4096)
    assert chosen(14)[0] == (1, True, 4096)
    found, line = chosen(8)
    assert found == (1, True, 4096)
    assert line.endswith("may be held; that is too much, and nothing takes less)")
    # What is given stays; experts have no tiles.
    number, offload, _ = chosen(14, training__offload_checkpoints=False)[0]
    assert number > 1
    assert not offload
    mixture = bare_config("mixtral") | {"num_hidden_layers": 4}
    assert chosen(0.01, mixture)[0].mlp_tile_size is None
    # An estimate decides for the device that it is for.
    config = config_of(SHAPES["llama3-8b"], data__max_length=65536, **auto)
    assert Planner(config, 1, 80).config.training.spared == (1, False, None)


def test_devices_by_their_memory() -> None:
    assert [device_of(gib).name for gib in (16, 24, 80, 141, 500)] == [
        DEVICES[index].name for index in (0, 0, 2, 3, 4)
    ]


SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}


@needs_compiler
def test_what_is_proposed_traces_within_the_device() -> None:
    config = config_of(SMALL, data__max_length=4096, training__loss_chunk_size=128)
    seen = set()
    for memory_gib in (1.25, 1.5, 3):
        planner = Planner(config, 1, memory_gib)
        best = planner.best()
        assert best is not None
        traced = trace_step(best.config, tokens=4096, rows=best.config.training.micro_batch_size)
        assert traced.peak_bytes <= planner.memory_bytes - best.memory.reserve
        seen.add(tuple(changes(config, best.config)))
    assert len(seen) > 1, "the proposal follows the memory"


def test_a_run_says_what_it_is_planned_to_hold() -> None:
    text = planned_text(config_of(SMALL), 1)
    assert text.startswith("1")
    assert "a rank, for rows of 1,024 tokens (frozen backbone " in text


def estimate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "estimate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command() -> None:
    found = estimate("--config", "configs/debug_tiny.json", "--device-memory-gib", "24")
    assert found.returncode == 0, found.stderr
    assert "1 x 24 GiB, rows of 288 tokens" in found.stdout
    assert "GeForce RTX 4090, which no run reaches" in found.stdout
    wrong = estimate("--config", "configs/debug_tiny.json", "--device-memory-gib", "-1")
    assert wrong.returncode == 2
    assert "allowed: GiB above 0" in wrong.stderr
