"""What is found in models: where the parts are, and what of it cannot be adapted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import empty_model, load_config, load_model, structure_of
from tests.decoders import bare_config
from tests.tiny import FAMILY_NAMES, tiny_config


def found_in(model_type: str, **changes: Any) -> Any:
    return structure_of(empty_model(load_config(config=bare_config(model_type) | changes)))


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_path_leads_to_the_module_it_names(model_type: str) -> None:
    structure = found_in(model_type)
    assert (structure.decoder, structure.layers) == ("model", "model.layers")
    assert (structure.embedding, structure.output_head) == ("model.embed_tokens", "lm_head")
    assert (structure.before, structure.after, structure.everywhere) == ((), ("model.norm",), ())
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert structure.linears == ((*attention, *mlp),) * 4


def test_other_names_are_found() -> None:
    structure = found_in("gpt_neox")
    assert (structure.layers, structure.embedding) == ("gpt_neox.layers", "gpt_neox.embed_in")
    assert structure.after == ("gpt_neox.final_layer_norm",)
    assert structure.linears[0][0] == "attention.query_key_value"
    # Without a plan for stages, what is neither embedding nor layer is everywhere.
    assert found_in("stablelm").everywhere == ("model.norm",)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_seen(tied: bool) -> None:
    assert found_in("llama", tie_word_embeddings=tied).tied is tied


def test_sizes_are_counted() -> None:
    shape = found_in("llama").shape
    assert (shape.hidden_size, shape.vocab_size, shape.num_layers) == (16, 67, 4)
    [layer] = set(shape.layers)
    assert layer.linear_weights == 16 * (2 * 16 + 2 * 8 + 3 * 24)
    assert layer.other_weights == 2 * 16
    assert layer.last_weights == 24 * 16
    assert layer.attention_size == 16
    # q, k, v and the attention's output, three tensors of the MLP's width, the hidden states.
    assert layer.activation_size == 16 + 8 + 8 + 16 + 3 * 24 + 16
    assert (layer.mlp_weights, layer.mlp_activation_size) == (3 * 16 * 24, 3 * 24)
    # Fused projections count alike.
    assert found_in("phi3").shape.layers[0] == layer


def test_experts_count_in_all_and_for_a_token() -> None:
    [layer] = set(found_in("qwen3_moe").shape.layers)
    assert layer.linear_weights == 16 * (2 * 16 + 2 * 8)
    assert layer.expert_weights == 4 * 3 * 16 * 8
    assert layer.active_expert_weights == 2 * 3 * 16 * 8
    # Two norms, those of queries and keys, the router.
    assert layer.other_weights == 2 * 16 + 2 * 8 + 4 * 16


def test_routers_and_gates_are_no_projections() -> None:
    found = found_in("qwen2_moe").linears[0]
    assert [path for path in found if path.startswith("mlp")] == [
        f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")
    ]


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_new_norm_multiplies_by_one(model_type: str, tiny_config: Callable[..., Any]) -> None:
    model = load_model(
        init="random", config=tiny_config(model_type), quantization="none", compute_dtype=torch.float32
    )
    hidden_states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    scaled = hidden_states / hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
    # 1e-5: the norm's epsilon under the root, and float32.
    torch.testing.assert_close(model.model.norm(hidden_states), scaled, rtol=1e-4, atol=1e-5)


def no_decoder(model: Any) -> None:
    model.get_decoder = lambda: model


def two_lists(model: Any) -> None:
    model.model.more_layers = nn.ModuleList([nn.Identity() for _ in range(6)])


def no_list(model: Any) -> None:
    model.model.layers = nn.ModuleList(model.model.layers[:2])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (no_decoder, r"no list of `num_hidden_layers` \(6\) modules"),
        (two_lists, r"2 lists of `num_hidden_layers` \(6\) modules"),
        (no_list, "no list of"),
    ],
)
def test_what_is_no_decoder_is_refused_with_the_reason(spoil: Callable[[Any], None], reason: str) -> None:
    model = empty_model(load_config(config=tiny_config("llama")))
    spoil(model)
    with pytest.raises(ModelError, match=rf"llama models cannot be adapted: .*{reason}.*; name a decoder"):
        structure_of(model)


def test_a_model_without_a_head_is_refused() -> None:
    model = empty_model(load_config(config=tiny_config("llama")))
    with pytest.raises(ModelError, match=r"a LlamaModel is no causal language model of transformers by it"):
        structure_of(model.model)


def test_weights_outside_of_modules_are_refused() -> None:
    model = empty_model(load_config(config=tiny_config("llama")))
    model.model.scale = nn.Parameter(torch.ones(1, device="meta"))
    with pytest.raises(ModelError, match="model holds scale beside its decoder layers"):
        structure_of(model)
