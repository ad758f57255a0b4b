"""A traced step of every family and setting: no device mix, the bytes of a real step, and what adds up."""

from __future__ import annotations

from itertools import cycle, product
from typing import Any

import pytest

from ssmlora_dist.fake_cuda.watch import CHECKPOINTS, DEQUANTISED, KINDS, LOGITS, MLP
from tests.decoders import TESTED
from tests.fake_cuda.cases import MODES, PADDING, ROWS, SHIPPED, needs_compiler, traced

WAYS = [
    {
        "quantization__mode": mode,
        "training__gradient_checkpointing": is_checkpointed,
        "data__packing": is_packed,
    }
    for mode, is_checkpointed, is_packed in product(MODES, (True, False), (True, False))
]
FAMILIES = list(zip(TESTED, cycle(WAYS), strict=False))
"""Each family in one of the ways."""
SETTINGS: dict[str, dict[str, Any]] = {
    "shipped placement": {"adapter__every_layer": SHIPPED},
    "without dropout": {"adapter__every_layer": SHIPPED, "adapter__dropout": 0},
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


@needs_compiler
@pytest.mark.parametrize(("name", "way"), FAMILIES, ids=[f"{name}-{way_of(way)}" for name, way in FAMILIES])
def test_no_device_mix_in_any_family_and_way(name: str, way: dict[str, Any]) -> None:
    step = traced(name, padding=0 if way["data__packing"] else PADDING, **way)
    assert sum(step.bytes_by_kind.values()) == step.peak_bytes > step.model_bytes > 0
    assert all(size >= 0 for size in step.bytes_by_kind.values())
    assert (step.bytes_by_kind[CHECKPOINTS] > 0) == way["training__gradient_checkpointing"]
    # What is recomputed in any case is the head's.
    layers_again = step.launches["recompute"] > step.launches["forward"] / 2
    assert layers_again == way["training__gradient_checkpointing"]
    within = [sync for sync in step.syncs if sync.phase != "step"]
    assert not within, "within a micro-batch nobody waits"
    assert sum(sync.times for sync in step.syncs) == 1, step.syncs


def test_every_way_is_gone_by_several_families() -> None:
    for way in WAYS:
        assert sum(other == way for _, other in FAMILIES) > 1


@pytest.mark.parametrize("name", SETTINGS)
def test_bytes_are_those_of_a_real_step(name: str) -> None:
    real, fake = (traced(device="cpu", fake=fake, **SETTINGS[name]) for fake in (False, True))
    assert fake.bytes_by_kind == real.bytes_by_kind
    assert fake.peak_bytes == real.peak_bytes
    # Whether gradients are clipped depends on what they are.
    assert {key for key in fake.operators.items() if key[0][0] != "step"} == {
        key for key in real.operators.items() if key[0][0] != "step"
    }


@pytest.mark.parametrize("name", MIXED_FAMILIES)
def test_bytes_of_other_families_are_those_of_a_real_step(name: str) -> None:
    real, fake = (traced(name, device="cpu", fake=fake) for fake in (False, True))
    assert fake.bytes_by_kind == real.bytes_by_kind
    assert {**fake.launches, "step": 0} == {**real.launches, "step": 0}


@needs_compiler
@pytest.mark.parametrize(
    ("name", "depths"), [("shipped placement", (2, 4, 6)), ("checkpoints in host memory", (4, 6, 8))]
)
def test_two_depths_tell_of_more(name: str, depths: tuple[int, ...]) -> None:
    # Enough tokens for a layer's activations to weigh more than its adapters, as they do in any real run.
    size = {"tokens": 512, "padding": 0, "training__loss_chunk_size": 256}
    few, more, most = (traced(num_layers=number, **size, **SETTINGS[name]) for number in depths)
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
    wide = {"tokens": 64, "padding": 0, "training__loss_chunk_size": 32, "adapter__every_layer": SHIPPED}
    plain = traced(**wide)
    offloaded = traced(**wide, training__offload_checkpoints=True)
    tiled = traced(**wide, training__mlp_tile_size=32)
    shared = traced(**wide, training__layers_per_checkpoint=2)
    assert plain.host_bytes == 0
    # Hidden states and, but for the first layer, states of two axes at rank 8, in bfloat16.
    assert offloaded.host_bytes == ROWS * 64 * 2 * (2 * 16 + 16)
    assert tiled.bytes_by_kind[MLP] < plain.bytes_by_kind[MLP]
    assert shared.bytes_by_kind[CHECKPOINTS] < plain.bytes_by_kind[CHECKPOINTS]
    assert plain.bytes_by_kind[DEQUANTISED] > 0


@needs_compiler
def test_only_supervised_tokens_have_logits() -> None:
    few, all_of_them = (traced(supervised=number, padding=0) for number in (5, None))
    assert all_of_them.bytes_by_kind[LOGITS] > few.bytes_by_kind[LOGITS] > 0
