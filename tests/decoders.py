"""Decoders of transformers: which are tested at tiny random size, which should work, which do not and why.

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
    "attention_dropout": 0.0,
    "residual_dropout": 0.0,
    "dropout": 0.0,
    "rotary_dim": 4,
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
    "granitemoe": {},
    "glm4_moe": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "init_std": 0.3},
    "persimmon": {},
}


REFUSED: dict[str, str] = {
    "falcon": "its decoder layers return a tuple, and not the hidden states alone",
    "gptj": "its decoder layers return a tuple, and not the hidden states alone",
    "bloom": "its decoder layers return a tuple, and not the hidden states alone",
    "mpt": "its decoder layers return a tuple, and not the hidden states alone",
    "falcon_h1": "its decoder layers return a tuple, and not the hidden states alone",
    "mamba": "its decoder does not hand keywords on to its layers",
    "gpt2": "its decoder layers hold no linear layers",
}
# Of another kind than the rest, so that some of what is tested does not hold.
LIMITED: dict[str, str] = {
    "apertus": "stored weights only: how its activation starts is not in `_init_weights`",
    "jamba, qwen3_next, qwen3_5_text, olmo_hybrid, recurrent_gemma": "hybrids: their recurrent layers read "
    "padding and packed neighbours, and `alternate` needs projections that all layers have",
}
INTRODUCTION = """\
# Models

There is no list of supported models: decoder layers, embedding, head and the linear layers that can be
adapted are found in the model itself. `adapter.alternate` and `adapter.every_layer` take the names of linear
layers under a decoder layer, fused ones included; what a model lacks is refused, with the nearest names,
before weights are loaded. The tests make this page: `python -m tests.decoders`.

## Tested

At tiny random size, by transformers' `model_type`: a fresh adapter changes no bit; gradient checkpointing
changes no bit, with the state's gradient full and detached; two pipeline stages compute what one does, to the
bit; a sequence alone, padded or in a batch; cached against full passes; our loss against the model's own;
dense and in NF4; weights as transformers' `from_pretrained` loads them, bit for bit.
"""
SHOULD_WORK = """\
## Should work

bitnet, deepseek_v2, deepseek_v3, diffllama, doge, gpt_bigcode, lfm2, phimoe, vaultgemma: their structure is
found. So it is with any model in transformers' manner: `launch/train.py --dry-run` says what is found, or why
it cannot be adapted.
"""
PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def bare_config(model_type: str) -> dict[str, Any]:
    """A bare configuration of a few thousand weights a layer, large enough to matter."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return {"model_type": model_type, **sizes, **TESTED.get(model_type, {})}


def page() -> str:
    """The content of `docs/models.md`."""
    known = {**REFUSED, **LIMITED}
    lines = [
        INTRODUCTION,
        *(f"- `{name}`" for name in sorted(TESTED)),
        "",
        SHOULD_WORK,
        "## Known not to work, or not wholly",
        "",
        "| model type | why |",
        "| --- | --- |",
        *(f"| {name} | {known[name]} |" for name in sorted(known)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
