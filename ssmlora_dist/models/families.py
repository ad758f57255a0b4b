"""The decoder families that are supported, as data: a new one is an entry here and a line in the tests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch import nn

from ssmlora_dist.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LLAMA_PROJECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.o_proj",
        "gate_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "down_proj": "mlp.down_proj",
    }
)


@dataclass(frozen=True)
class Family:
    """Where things are in a decoder family's models, by the names of transformers.

    Whether the output head shares the embedding's weight is not the family's to say: it is
    `config.tie_word_embeddings` of each model.

    Attributes:
        model_type: as in the model's `config.json`.
        decoder_layer: class name of one decoder layer.
        projections: linear layers that can be adapted and quantised, to their path in a decoder layer.
        layers: path of the list of decoder layers.
        embedding: path of the token embedding.
        rotary_embedding: path of the module that makes the rotary position embeddings.
        final_norm: path of the norm behind the last layer.
        output_head: path of the output head.
        initial_norm_weight: of a norm in a new model; 0 where the norm multiplies by 1 + weight.
        supports_sdpa: False where attention logits are capped, which sdpa cannot do.
    """

    model_type: str
    decoder_layer: str
    projections: Mapping[str, str] = field(default_factory=lambda: LLAMA_PROJECTIONS)
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    rotary_embedding: str = "model.rotary_emb"
    final_norm: str = "model.norm"
    output_head: str = "lm_head"
    initial_norm_weight: float = 1.0
    supports_sdpa: bool = True


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            Family("llama", "LlamaDecoderLayer"),
            Family("mistral", "MistralDecoderLayer"),
            Family("qwen2", "Qwen2DecoderLayer"),
            Family("qwen3", "Qwen3DecoderLayer"),
            Family("gemma2", "Gemma2DecoderLayer", initial_norm_weight=0.0, supports_sdpa=False),
        )
    }
)


def require_supported(model_type: object) -> Family:
    """The family of `model_type`.

    Raises:
        ModelError: it is not supported; the message lists what is.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"model: the model type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return family


def projection_path(family: Family, projection: str) -> str:
    """Path of `projection` in a decoder layer: `q_proj` -> `self_attn.q_proj`.

    Raises:
        ModelError: the family has no such projection; the message lists those it has.
    """
    path = family.projections.get(projection)
    if path is None:
        nearest = difflib.get_close_matches(projection, family.projections, n=1)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise ModelError(
            f"adapter: {family.model_type} models have no projection {projection!r}{hint}; "
            f"they have {', '.join(family.projections)}"
        )
    return path


def decoder_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The decoder layers that a supported model holds, by their index: all, or those of a pipeline stage.

    Raises:
        ModelError: the model's type is not supported, or its layers are not where such a model has them.
    """
    try:
        layers = model.get_submodule(require_supported(model.config.model_type).layers)
    except AttributeError as error:
        raise ModelError(
            f"a {type(model).__name__} is no causal language model of transformers by itself; pass it as "
            "`load_model` or `AutoModelForCausalLM` gives it, with nothing around it and nothing taken off"
        ) from error
    return {int(index): layer for index, layer in layers.named_children()}
