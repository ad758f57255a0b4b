"""The registry of families against the models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import FAMILIES, decoder_layers, load_model, projection_path, require_supported


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_path_leads_to_the_module_it_names(model_type: str, tiny_config: Callable[..., Any]) -> None:
    family = FAMILIES[model_type]
    model = load_model(init="random", config=tiny_config(model_type), quantization="none")
    layers = list(decoder_layers(model).values())
    assert len(layers) == 2
    assert {type(layer).__name__ for layer in layers} == {family.decoder_layer}
    for layer in layers:
        linears = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        assert linears == set(family.projections.values())
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.output_head) is model.get_output_embeddings()
    assert "RMSNorm" in type(model.get_submodule(family.final_norm)).__name__
    assert "RotaryEmbedding" in type(model.get_submodule(family.rotary_embedding)).__name__


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_new_norm_multiplies_by_one(model_type: str, tiny_config: Callable[..., Any]) -> None:
    family = FAMILIES[model_type]
    model = load_model(
        init="random", config=tiny_config(model_type), quantization="none", compute_dtype=torch.float32
    )
    norm = model.get_submodule(family.final_norm)
    hidden_states = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    scaled = hidden_states / hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
    # 1e-5: the norm's epsilon under the root, and float32.
    torch.testing.assert_close(norm(hidden_states), scaled, rtol=1e-4, atol=1e-5)


def test_projections_are_found_by_name() -> None:
    assert projection_path(FAMILIES["llama"], "q_proj") == "self_attn.q_proj"
    assert projection_path(FAMILIES["gemma2"], "down_proj") == "mlp.down_proj"


def test_an_unknown_projection_is_refused_with_the_nearest_and_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"no projection 'q_prj' \(did you mean q_proj\?\).*gate_proj"):
        projection_path(FAMILIES["llama"], "q_prj")


@pytest.mark.parametrize("model_type", ["gpt2", "", None, ["llama"]])
def test_other_families_are_refused_with_the_supported_ones(model_type: Any) -> None:
    with pytest.raises(ModelError, match="llama, mistral, qwen2, qwen3, gemma2"):
        require_supported(model_type)
