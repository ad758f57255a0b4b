"""What the shipped configuration costs on a GPU: bounds that a change must not pass unseen."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from ssmlora_dist.fake_cuda.step import Traced, trace_step
from ssmlora_dist.fake_cuda.watch import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTE, STEP
from ssmlora_dist.ops.dropped import PIECE_ELEMENTS
from tests.decoders import bare_config
from tests.fake_cuda.cases import SHIPPED, config_of, needs_compiler, traced

pytestmark = needs_compiler

TOKENS = 64
IN_A_LAYER = (FORWARD, RECOMPUTE, BACKWARD)
# As counted; a change that lowers one lowers it here.
LAUNCHES_OF_A_FROZEN_LAYER = 151
LAUNCHES_OF_AN_ADAPTED_LINEAR = 21
LAUNCHES_OF_A_STEP = 32
# Read and written by element-wise operators and products, of a llama of these sizes, in bfloat16.
MOVED_KIB_OF_A_LAYER_AND_TOKEN = 17
SYNCS_OF_A_STEP = 1


@functools.cache
def shipped(num_layers: int, micro_batches: int = 1, **settings: Any) -> Traced:
    return traced(
        num_layers=num_layers,
        tokens=TOKENS,
        rows=1,
        padding=0,
        micro_batches=micro_batches,
        adapter__every_layer=SHIPPED,
        **settings,
    )


def launches_of_a_layer(few: Traced, more: Traced) -> float:
    return sum(more.launches[phase] - few.launches[phase] for phase in IN_A_LAYER) / 2


def test_launches_of_a_layer() -> None:
    few, more = shipped(2), shipped(4)
    layer = launches_of_a_layer(few, more)
    # The first two layers are adapted, the others are not.
    frozen = launches_of_a_layer(few, shipped(4, adapter__layers="0:2"))
    assert frozen <= LAUNCHES_OF_A_FROZEN_LAYER
    assert (layer - frozen) / (1 + len(SHIPPED)) <= LAUNCHES_OF_AN_ADAPTED_LINEAR


def test_bytes_moved_of_a_layer() -> None:
    few, more = shipped(2), shipped(4)
    moved = sum(more.moved_bytes[phase] - few.moved_bytes[phase] for phase in IN_A_LAYER) / 2
    assert moved / 1024 / TOKENS <= MOVED_KIB_OF_A_LAYER_AND_TOKEN


@pytest.mark.parametrize("setting", ["plain", "offload", "packed", "tiles", "own logits"])
def test_the_host_waits_once_a_step(setting: str) -> None:
    settings: dict[str, Any] = {
        "plain": {},
        "offload": {"training__offload_checkpoints": True},
        "packed": {"data__packing": True},
        "tiles": {"training__mlp_tile_size": 32},
        "own logits": {"model_type": "granite"},
    }[setting]
    for number in (1, 2):
        syncs = shipped(2, number, **settings).syncs
        assert [(sync.phase, sync.times) for sync in syncs] == [(STEP, SYNCS_OF_A_STEP)], syncs


def test_launches_of_a_step_do_not_grow_with_the_parameters() -> None:
    few, more = shipped(2), shipped(4)
    for step in (few, more):
        assert step.launches[STEP] + step.launches[OPTIMIZER] <= LAUNCHES_OF_A_STEP


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
