"""Bytes counted without quantising are those of what is then quantised."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from ssmlora_dist.quantization import (
    QuantizationMode,
    QuantizedExperts,
    QuantizedLinear,
    expert_weights,
    quantize_experts,
    quantize_linear,
    stored_bytes,
)
from tests.quantization.test_experts import tiny_model

MODES = get_args(QuantizationMode)
# From the model's `config.json`.
QWEN3_30B_A3B = {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def quantized(layer: nn.Module, **settings: Any) -> nn.Module:
    for path, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            layer.set_submodule(path, quantize_linear(module, **settings))
        elif expert_weights(module):
            layer.set_submodule(path, quantize_experts(module, **settings))
    return layer


def counted(layer: nn.Module) -> int:
    """Of what the layer holds, without code books."""
    tensors: list[Tensor] = list(layer.parameters())
    for module in layer.modules():
        if isinstance(module, QuantizedLinear | QuantizedExperts):
            tensors += [buffer for name, buffer in module.named_buffers() if name != "nested_code"]
        state = getattr(module, "quant_state", None)
        if state is not None:
            tensors.append(state.absmax)
            tensors += [state.offset, state.state2.absmax] if state.nested else []
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_it_counts_what_is_stored(
    family: str, mode: Any, double_quantization: bool, dtype: torch.dtype
) -> None:
    # Weights of experts that fill neither blocks nor whole elements of the storage.
    layer = tiny_model(family, dtype=dtype, moe_intermediate_size=38, intermediate_size=38).model.layers[0]
    settings = {"mode": mode, "double_quantization": double_quantization, "compute_dtype": dtype}
    assert stored_bytes(layer, mode="none", compute_dtype=dtype) == sum(p.nbytes for p in layer.parameters())
    expected = stored_bytes(layer, **settings)
    assert expected == counted(quantized(layer, **settings))


def test_qwen3_30b_a3b_fits_a_card_of_24_gb() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.for_model("qwen3_moe", **QWEN3_30B_A3B)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    assert num_weights == 30_532_122_624
    layers = model.model.layers
    rest = [model.model.embed_tokens, model.model.norm, model.lm_head]
    num_bytes = stored_bytes(layers, mode="nf4") + sum(stored_bytes(part, mode="none") for part in rest)
    dense = stored_bytes(model, mode="none")
    assert dense == 2 * num_weights
    print(f"{num_bytes / 2**30:.2f} GiB, dense {dense / 2**30:.2f} GiB")
    assert num_bytes < 17.5 * 2**30
