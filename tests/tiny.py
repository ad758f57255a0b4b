"""Randomly initialised models of every supported family, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.models import decoder_layers, load_model
from ssmlora_dist.ops.dropout import token_seeds

SEED = 20250204
VOCAB_SIZE = 67
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
QV_AND_MLP = AdapterConfig(rank=4, alternate=("q_proj", "v_proj"), every_layer=("down_proj",))
"""Time modules on alternating q_proj and v_proj, plain LoRA beside them."""


def tiny_config(model_type: str = "llama", num_layers: int = 6, **changes: Any) -> dict[str, Any]:
    """A bare configuration of some 2,000 weights a layer, with weights large enough to matter."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if model_type == "gemma2":
        # Caps low enough to bend the numbers.
        config |= {"head_dim": 8, "query_pre_attn_scalar": 8}
        config |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    if model_type == "qwen3":
        config |= {"head_dim": 8}
    if model_type in ("mistral", "gemma2"):
        config |= {"sliding_window": 6}
    return config | changes


def tiny_model(
    model_type: str = "llama",
    *,
    num_layers: int = 6,
    dtype: torch.dtype = torch.float32,
    quantization: Any = "none",
    **changes: Any,
) -> Any:
    """A frozen model of random weights, the same at every call."""
    return load_model(
        init="random",
        config=tiny_config(model_type, num_layers, **changes),
        quantization=quantization,
        compute_dtype=dtype,
        seed=SEED,
    )


def adapted_model(model_type: str = "llama", config: AdapterConfig = QV_AND_MLP, **settings: Any) -> Any:
    """A tiny model whose adapters have moved away from their start, so that the state matters."""
    model = add_adapters(tiny_model(model_type, **settings), config)
    randomize_adapters(model)
    return model


def layers_of(model: Any) -> list[Any]:
    """The decoder layers, in order."""
    return list(decoder_layers(model).values())


def randomize_adapters(model: nn.Module, seed: int = SEED) -> None:
    """Draws all adapter parameters but `lora_A`, which keeps its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "state_" in name:
                parameter.copy_(0.3 * drawn)
            elif "lora_B" in name:
                parameter.copy_(0.1 * drawn)


def token_ids(batch: int, length: int, seed: int = SEED) -> Tensor:
    """[batch, length] without the padding token 0."""
    return torch.randint(1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def dropout_seeds(samples: Sequence[int], num_tokens: int) -> Tensor:
    """[B,S] for rows of one sample each, from the seeds of these."""
    return torch.stack([token_seeds(seed, num_tokens) for seed in samples])
