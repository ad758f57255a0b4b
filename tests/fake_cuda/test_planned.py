"""Bytes that are planned against those of traced steps, which are those of real ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ssmlora_dist.distributed.partition import stage_loads
from ssmlora_dist.fake_cuda.step import trace_step
from ssmlora_dist.training.topology import ModelSizes
from tests.fake_cuda.cases import SHIPPED, config_of, needs_compiler

TOLERANCE = 0.05
NUM_LAYERS = 4
# As wide as small models are, so that what is left out of plans is as small a part as there.
SHAPES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
}
MANY_HEADS = SHAPES | {"num_key_value_heads": 8}
LONG = {"training__loss_chunk_size": 128}
CASES: dict[str, dict[str, Any]] = {
    "logits": {"tokens": 512},
    "an MLP": {"tokens": 2048, **LONG},
    "rows": {"tokens": 512, "rows": 4, **LONG},
    "adapters everywhere": {"tokens": 2048, "adapter__every_layer": SHIPPED, **LONG},
    "dense weights": {"tokens": 2048, "quantization__mode": "none", **LONG},
    "float32": {"tokens": 2048, "model__compute_dtype": "float32", **LONG},
    "kept activations": {"tokens": 1024, "training__gradient_checkpointing": False, **LONG},
    "two layers a checkpoint": {"tokens": 2048, "training__layers_per_checkpoint": 2, **LONG},
    "host memory": {"tokens": 2048, "training__offload_checkpoints": True, **LONG},
    "tiles": {"tokens": 4096, "training__mlp_tile_size": 512, **LONG},
    "tiles and host memory": {
        "tokens": 4096,
        "training__mlp_tile_size": 512,
        "training__offload_checkpoints": True,
        **LONG,
    },
    "tiles, many heads": {"tokens": 4096, "shapes": MANY_HEADS, "training__mlp_tile_size": 512, **LONG},
}


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_what_is_planned_is_what_is_traced(name: str) -> None:
    case = {"shapes": SHAPES, "adapter__dropout": 0, "rows": 1} | CASES[name]
    tokens, rows, shapes = case.pop("tokens"), case.pop("rows"), case.pop("shapes")
    case |= {"training__micro_batch_size": rows, "training__global_batch_size": rows, "model__config": shapes}
    config = config_of(**case)
    found = trace_step(config, tokens=tokens, rows=rows)
    costs = ModelSizes.of(config).costs(config, 1, tokens, tokens - 1)
    if costs.recompute != "none":
        costs = replace(costs, recompute="on_gradient")
    (load,) = stage_loads(costs, (0,))
    assert load.memory_bytes == pytest.approx(found.peak_bytes, rel=TOLERANCE), (load, found.bytes_by_kind)
