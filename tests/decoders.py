"""Decoders of transformers: which the tests build at tiny random size, which should work, which do not and why.

`docs/models.md` is made of these tables: `python -m tests.decoders` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 67,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "sliding_window": 6,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
ALTERNATING_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
TESTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma": {},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        # Low enough to bend the numbers.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": ALTERNATING_KINDS,
    "olmo2": {},
    "olmo3": ALTERNATING_KINDS,
    "smollm3": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
    },
    "cohere": {"logit_scale": 0.3},
    "cohere2": ALTERNATING_KINDS | {"logit_scale": 0.3},
    "phi": {},
    "phi3": {},
    "glm": {},
    "glm4": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 8},
    "qwen3_moe": {},
    "mixtral": {},
    "olmoe": {},
    "gpt_oss": {},
    "ministral": ALTERNATING_KINDS,
    "ministral3": {},
    "gpt_neox": {},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "helium": {},
    "exaone4": {},
    "arcee": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "ernie4_5": {},
    "apertus": {},
    "granitemoe": {},
    "glm4_moe": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
    "persimmon": {},
}


def bare_config(model_type: str) -> dict[str, Any]:
    """A bare configuration of a few thousand weights a layer, large enough to matter."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return {"model_type": model_type, **sizes, **TESTED.get(model_type, {})}
