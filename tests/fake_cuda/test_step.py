"""A traced step of every family and setting: no device mix, the bytes of a real step, and what adds up."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest

from ssmlora_dist.fake_cuda.step import trace_step
from ssmlora_dist.fake_cuda.watch import CHECKPOINTS, DEQUANTISED, KINDS, MLP
from ssmlora_dist.ops.fused import PIECE_ELEMENTS
from tests.decoders import TESTED, bare_config
from tests.fake_cuda.cases import MODES, PADDING, ROWS, SHIPPED, TOKENS, config_of, needs_compiler, traced

WAYS = [
    {
        "quantization__mode": mode,
        "training__gradient_checkpointing": is_checkpointed,
        "data__packing": is_packed,
    }
    for mode, is_checkpointed, is_packed in product(MODES, (True, False), (True, False))
]
"""In what every family must run."""
FAMILIES = list(zip(TESTED, cycle(WAYS)))
OTHER_FAMILIES = [(name, way) for name, way in FAMILIES if name != "llama"]
SETTINGS: dict[str, dict[str, Any]] = {
    "shipped placement": {"adapter__every_layer": SHIPPED},
    "without dropout": {"adapter__every_layer": SHIPPED, "adapter__dropout": 0},
    "fp4": {"quantization__mode": "fp4"},
    "int8": {"quantization__mode": "int8"},
    "dense": {"quantization__mode": "none"},
    "kept activations": {"training__gradient_checkpointing": False},
    "two layers a checkpoint": {"training__layers_per_checkpoint": 2},
    "checkpoints in host memory": {"training__offload_checkpoints": True},
    "tiles": {"training__mlp_tile_size": 10, "adapter__every_layer": SHIPPED},
    "chunks": {"training__loss_chunk_size": 8},
    "packed": {"data__packing": True, "padding": 0},
    "eager attention": {"model__attention": "eager"},
    "two micro-batches": {"micro_batches": 2},
    "float32": {"model__compute_dtype": "float32"},
}
MIXED_FAMILIES = ("gemma2", "mixtral", "granite", "gpt_oss")


def way_of(way: dict[str, Any]) -> str:
    return "-".join(
        [
            way["quantization__mode"],
            "recomputed" if way["training__gradient_checkpointing"] else "kept",
            "packed" if way["data__packing"] else "padded",
        ]
    )


def check(model_type: str, way: dict[str, Any]) -> None:
    padding = 0 if way["data__packing"] else PADDING
    step = traced(model_type, padding=padding, **way)
    assert sum(step.bytes_by_kind.values()) == step.peak_bytes > step.model_bytes > 0
    assert all(size >= 0 for size in step.bytes_by_kind.values())
    assert (step.bytes_by_kind[CHECKPOINTS] > 0) == way["training__gradient_checkpointing"]
    assert (step.launches["recompute"] > 20) == way["training__gradient_checkpointing"]
    per_batch = [sync for sync in step.syncs if sync.phase != "step"]
    assert not per_batch, "within a micro-batch nobody waits"
    assert sum(sync.times for sync in step.syncs) == 1, step.syncs


@needs_compiler
@pytest.mark.parametrize("way", WAYS, ids=map(way_of, WAYS))
def test_no_device_mix_in_any_way(way: dict[str, Any]) -> None:
    check("llama", way)


@needs_compiler
@pytest.mark.parametrize(("name", "way"), OTHER_FAMILIES, ids=[name for name, _ in OTHER_FAMILIES])
def test_no_device_mix_in_any_family(name: str, way: dict[str, Any]) -> None:
    check(name, way)


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_are_those_of_a_real_step(name: str) -> None:
    real, fake = (traced(num_layers=3, device="cpu", fake=fake, **SETTINGS[name]) for fake in (False, True))
    assert fake.bytes_by_kind == real.bytes_by_kind
    assert fake.peak_bytes == real.peak_bytes
    assert fake.operators == real.operators


@pytest.mark.parametrize("name", MIXED_FAMILIES)
def test_bytes_of_other_families_are_those_of_a_real_step(name: str) -> None:
    real, fake = (traced(name, device="cpu", fake=fake) for fake in (False, True))
    assert fake.bytes_by_kind == real.bytes_by_kind
    assert fake.launches == real.launches


@needs_compiler
@pytest.mark.parametrize("name", ["shipped placement", "kept activations", "checkpoints in host memory"])
def test_two_and_four_layers_tell_of_more(name: str) -> None:
    few, more, most = (traced(num_layers=number, **SETTINGS[name]) for number in (2, 4, 6))
    for measure in ("peak_bytes", "model_bytes", "host_bytes"):
        first, second, third = (getattr(step, measure) for step in (few, more, most))
        assert third - second == second - first, measure
    for kind in KINDS:
        first, second, third = (step.bytes_by_kind[kind] for step in (few, more, most))
        assert third - second == second - first, kind
    for phase in few.launches:
        assert most.launches[phase] - more.launches[phase] == more.launches[phase] - few.launches[phase]


@needs_compiler
def test_what_spares_memory_is_seen_to() -> None:
    wide = {"tokens": 64, "padding": 0, "num_layers": 4, "training__loss_chunk_size": 8}
    plain = traced(**wide, adapter__every_layer=SHIPPED)
    offloaded = traced(**wide, adapter__every_layer=SHIPPED, training__offload_checkpoints=True)
    tiled = traced(**wide, adapter__every_layer=SHIPPED, training__mlp_tile_size=8)
    shared = traced(**wide, adapter__every_layer=SHIPPED, training__layers_per_checkpoint=4)
    assert plain.host_bytes == 0
    # Hidden states and, but for the first layer, states of two axes at rank 8, in bfloat16.
    assert offloaded.host_bytes == ROWS * 64 * 2 * (4 * 16 + 3 * 16)
    assert offloaded.bytes_by_kind[CHECKPOINTS] < plain.bytes_by_kind[CHECKPOINTS]
    assert tiled.bytes_by_kind[MLP] < plain.bytes_by_kind[MLP]
    assert shared.bytes_by_kind[CHECKPOINTS] < plain.bytes_by_kind[CHECKPOINTS]
    assert plain.bytes_by_kind[DEQUANTISED] > 0


@needs_compiler
def test_dropout_makes_no_copy_of_what_adapters_read() -> None:
    shape = bare_config("llama") | {"intermediate_size": 14336}
    tokens = 2**15
    dropped, plain = (
        trace_step(
            config_of(shapes=shape, adapter__every_layer=SHIPPED, adapter__dropout=dropout),
            num_layers=2,
            tokens=tokens,
        )
        for dropout in (0.05, 0)
    )
    seed_bytes, piece_bytes = 4 * tokens, 2 * PIECE_ELEMENTS
    added = dropped.peak_bytes - plain.peak_bytes
    assert added <= 2 * piece_bytes + seed_bytes, f"{added / tokens:,.0f} bytes a token"


@needs_compiler
def test_only_supervised_tokens_have_logits() -> None:
    config = config_of(training__loss_chunk_size=1024)
    few, all_of_them = (
        trace_step(config, num_layers=2, tokens=TOKENS, rows=ROWS, supervised=number) for number in (5, None)
    )
    assert all_of_them.bytes_by_kind["logits"] > few.bytes_by_kind["logits"]
