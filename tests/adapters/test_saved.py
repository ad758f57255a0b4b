"""Modules that are trained whole: the base model at first, their gradients, and the base model back again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import (
    AdapterConfig,
    add_adapters,
    disabled_adapters,
    load_adapter,
    remove_adapters,
    save_adapter,
    set_adapter,
)
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.data import Example, collate
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models import load_config, load_model, structure_of
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.structure import empty_model, modules_named
from tests.decoders import bare_config
from tests.tiny import SEED, randomize_adapters, tiny_model, token_ids

NAMES = ("embed_tokens", "norm", "input_layernorm", "lm_head")
SAVED = AdapterConfig(rank=4, every_layer=("down_proj",), modules_to_save=NAMES)
# Norms that compute in float32, a table that is scaled as it is read, a router, norms with biases.
FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen3_moe", "gpt_neox", "cohere2")


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, 9) if tokens is None else tokens, use_cache=False).logits


def whole(model: Any) -> dict[str, Any]:
    """The parameters of the saved modules."""
    return {
        name: p
        for name, p in adapter_parameters(model).items()
        if "lora_" not in name and "state_" not in name
    }


def drawn(model: Any) -> Any:
    """The model with saved modules that have moved far away from their start."""
    randomize_adapters(model)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in whole(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_i1_at_first_it_is_the_base_model(model_type: str, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"quantization": "nf4", "compute_dtype": dtype, "seed": SEED}
    model = load_model(init="random", config=bare_config(model_type), **settings)
    expected = logits(model)
    every_name = structure_of(model).savable
    add_adapters(
        model,
        AdapterConfig(method="lora", alternate=(), every_layer="all-linear", modules_to_save=every_name),
    )
    assert torch.equal(logits(model), expected)
    assert model.dtype == dtype
    parameters = whole(model)
    assert {name.rpartition(".")[0] for name in parameters} == set(every_name)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    model(token_ids(2, 9), use_cache=False).logits.float().square().sum().backward()
    assert [name for name, p in parameters.items() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_modules_themselves(checkpointing: bool) -> None:
    """Of a row of one sample, and of packed samples."""
    samples = [Example.from_tokens(token_ids(1, n, seed=n)[0].tolist(), [True] * n) for n in (9, 4)]
    batch = collate([samples, samples[:1]], 0)
    plain = tiny_model(num_layers=2)
    for path, module in plain.named_modules():
        module.requires_grad_(path.rpartition(".")[2] in NAMES)
    CausalLMLoss(plain.train(), 4)(batch).backward()
    model = add_adapters(tiny_model(num_layers=2), SAVED).train()
    if checkpointing:
        checkpoint_layers(model)
    loss = CausalLMLoss(model, 4)
    assert not loss.uses_own_logits
    loss(batch).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in whole(model).items()}
    assert len(found) == 5
    assert found.keys() == expected.keys()
    assert [name for name, grad in found.items() if not torch.equal(grad, expected[name])] == []


def test_the_base_model_comes_back() -> None:
    model = tiny_model(num_layers=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = logits(model)
    drawn(add_adapters(model, SAVED))
    first = logits(model)
    loss, batch = CausalLMLoss(model, 4), collate([[Example.from_tokens(range(1, 9), [True] * 8)]], 0)
    with disabled_adapters(model), torch.no_grad():
        assert torch.equal(logits(model), expected)
        assert torch.equal(loss(batch), CausalLMLoss(tiny_model(num_layers=2), 4)(batch))
    assert not torch.equal(first, expected)
    add_adapters(model, AdapterConfig(rank=2, modules_to_save=("norm",)), name="second")
    assert torch.equal(logits(model), expected)
    drawn(model)
    second = logits(model)
    assert torch.equal(logits(set_adapter(model, "default")), first)
    assert torch.equal(logits(set_adapter(model, "second")), second)
    after = dict(remove_adapters(model).named_parameters())
    assert torch.equal(logits(model), expected)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_saved_is_loaded_bitwise_and_generates(tmp_path: Path) -> None:
    model = drawn(add_adapters(tiny_model(), SAVED))
    save_adapter(model, tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    assert loaded.ssmlora_config == model.ssmlora_config
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(model))
    tokens = {
        is_cached: loaded.generate(token_ids(2, 9), max_new_tokens=8, do_sample=False, use_cache=is_cached)
        for is_cached in (False, True)
    }
    assert torch.equal(tokens[False], tokens[True])


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("embed_token",), {}, r"'embed_token', which is no module .*\(did you mean embed_tokens\?\)"),
        (("q_proj",), {}, "'q_proj', a linear layer of the decoder layers, which may be quantised; adapt it"),
        (("lm_head",), {"tie_word_embeddings": True}, "'lm_head', which is tied to model.embed_tokens"),
        (
            ("experts",),
            {"model_type": "qwen3_moe"},
            "'experts', which is no module that can be trained whole",
        ),
    ],
)
def test_what_is_refused(names: tuple[str, ...], changes: dict[str, Any], message: str) -> None:
    config = bare_config(changes.pop("model_type", "llama")) | changes
    structure = structure_of(empty_model(load_config(config=config)))
    with pytest.raises(AdapterError, match=f"adapter: `modules_to_save` names {message}"):
        modules_named(structure, names)
