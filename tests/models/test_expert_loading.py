"""Experts of a stored model, quantised as they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist.models.loading import fill
from ssmlora_dist.models.weights import SafetensorsWeights
from ssmlora_dist.quantization import dequantized_weight, is_quantized, quantize_experts, quantize_linear

PREFIX = "model.layers.1"


@pytest.fixture(scope="module")
def stored(save_checkpoint: Callable[..., Path]) -> Path:
    # Stored under the names that its parameters have.
    return save_checkpoint("gpt_oss", num_local_experts=4, num_experts_per_tok=2)


def layer_of(directory: Path) -> tuple[Any, Any]:
    """The second layer as transformers loads it, and the same without storage."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
    return loaded.model.layers[1], empty.model.layers[1]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_layer_is_that_of_transformers_quantised(stored: Path, mode: Any) -> None:
    loaded, layer = layer_of(stored)
    source, reads = SafetensorsWeights(stored), []
    read = source.read
    source.read = lambda name, **settings: reads.append(name) or read(name, **settings)
    quantize = {"mode": mode, "double_quantization": True, "compute_dtype": torch.bfloat16}
    fill(layer, PREFIX, source, device=torch.device("cpu"), quantize=quantize)
    assert sorted(reads) == sorted(f"{PREFIX}.{name}" for name, _ in loaded.named_parameters())
    expected = quantize_experts(loaded.mlp.experts, **quantize)
    assert is_quantized(layer.mlp.experts)
    for name in expected.shapes:
        assert torch.equal(dequantized_weight(layer.mlp.experts, name), dequantized_weight(expected, name)), (
            name
        )
    query = quantize_linear(loaded.self_attn.q_proj, **quantize)
    assert torch.equal(dequantized_weight(layer.self_attn.q_proj), dequantized_weight(query))
    for name in ("mlp.router.weight", "mlp.router.bias", "mlp.experts.down_proj_bias"):
        parameter: Tensor = layer.get_parameter(name)
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_they_stay_dense_where_nothing_is_quantised(stored: Path) -> None:
    loaded, layer = layer_of(stored)
    source = SafetensorsWeights(stored)
    fill(layer, PREFIX, source, device=torch.device("cpu"))
    assert not is_quantized(layer.mlp.experts)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter), name
