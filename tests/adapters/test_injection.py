"""Adapters put into decoder layers in place: start values, what is frozen, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters, insert_adapters, load_adapter_tensors
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.state import AdaptedDecoderLayer, StatefulDecoderLayer
from ssmlora_dist.errors import AdapterError, ModelError
from ssmlora_dist.models import structure_of
from tests.tiny import (
    FAMILY_NAMES,
    QV_AND_MLP,
    adapted_model,
    dropout_seeds,
    layers_of,
    tiny_model,
    token_ids,
)

PREFIX = "model.layers"
NUM_LAYERS = 6


def start_values(
    only: tuple[int, ...] = tuple(range(NUM_LAYERS)), seed: int = 0, **settings: Any
) -> dict[str, Tensor]:
    """Adapter parameters by full name, of a model in which `only` some layers were adapted."""
    model = tiny_model(**settings)
    layers = {layer_idx: layers_of(model)[layer_idx] for layer_idx in only}
    insert_adapters(layers, QV_AND_MLP, num_layers=NUM_LAYERS, prefix=PREFIX, seed=seed)
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


def assert_same(some: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert some.keys() == other.keys()
    assert [name for name in some if not torch.equal(some[name], other[name])] == []


@pytest.mark.parametrize("only", [(0,), (3,), (2, 5), (5, 4, 1)])
def test_start_values_do_not_depend_on_which_layers_are_here(only: tuple[int, ...]) -> None:
    whole = start_values()
    here = {name for name in whole if int(name.split(".")[2]) in only}
    assert_same(start_values(only), {name: whole[name] for name in sorted(here)})


def test_start_values_depend_on_the_seed_and_the_name_alone() -> None:
    first = start_values()
    torch.manual_seed(99)
    torch.rand(7)
    assert_same(start_values(), first)
    drawn = [tensor for name, tensor in first.items() if name.endswith("lora_A.weight")]
    drawn += [tensor for name, tensor in start_values(seed=1).items() if name.endswith("lora_A.weight")]
    assert len(drawn) == 2 * 2 * NUM_LAYERS
    assert len({tuple(tensor.flatten().tolist()) for tensor in drawn}) == len(drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_start_values_do_not_depend_on_how_the_base_is_stored(quantization: str, dtype: torch.dtype) -> None:
    assert_same(start_values(quantization=quantization, dtype=dtype), start_values())


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_adapters_alone_are_trained(model_type: str) -> None:
    model = tiny_model(model_type).requires_grad_(True)
    before = dict(model.named_parameters())
    add_adapters(model, QV_AND_MLP)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(adapter_parameters(model))
    # What was there is there still, under its old name or as a base layer.
    after = {
        name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if not p.requires_grad
    }
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_names_are_those_of_peft() -> None:
    names = list(adapter_parameters(add_adapters(tiny_model(num_layers=2), QV_AND_MLP)))
    assert names == sorted(names)
    time_module = ["lora_A.weight", "lora_B.weight", "state_input", "state_transition"]
    assert names == [
        *(f"{PREFIX}.0.mlp.down_proj.{name}" for name in time_module[:2]),
        *(f"{PREFIX}.0.self_attn.q_proj.{name}" for name in time_module),
        *(f"{PREFIX}.1.mlp.down_proj.{name}" for name in time_module[:2]),
        *(f"{PREFIX}.1.self_attn.v_proj.{name}" for name in time_module),
    ]


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_projection_of_a_family_can_be_adapted(model_type: str) -> None:
    config = AdapterConfig(rank=2, alternate=(), every_layer="all-linear", every_layer_method="ssmlora")
    model = add_adapters(tiny_model(model_type, num_layers=2), config)
    paths = structure_of(model).linears
    assert len(paths[0]) == 7
    for layer, own in zip(layers_of(model), paths, strict=True):
        for axis, path in enumerate(own):
            module = layer.get_submodule(path)
            assert isinstance(module, LoRALinear)
            assert (module.form.name, module.form.axis) == ("ssmlora", axis)


def test_layers_of_plain_lora_have_no_state() -> None:
    model = add_adapters(tiny_model(), AdapterConfig(method="lora"))
    for layer in layers_of(model):
        assert isinstance(layer, AdaptedDecoderLayer)
        assert not isinstance(layer, StatefulDecoderLayer)
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == NUM_LAYERS


def adapters_of(layer: Any) -> dict[str, LoRALinear]:
    return {
        path.rpartition(".")[2]: module
        for path, module in layer.named_modules()
        if isinstance(module, LoRALinear)
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_adapters_that_read_one_tensor_know_each_other(model_type: str, dropout: float) -> None:
    config = AdapterConfig(method="lora", rank=2, alternate=(), every_layer="all-linear", dropout=dropout)
    model = add_adapters(tiny_model(model_type, num_layers=2), config)
    inputs: dict[LoRALinear, Tensor] = {}
    for layer in layers_of(model):
        for module in adapters_of(layer).values():
            module.register_forward_pre_hook(lambda _, x, module=module: inputs.update({module: x[0]}))
    model(torch.ones(1, 3, dtype=torch.long), use_cache=False)
    for layer in layers_of(model):
        modules = adapters_of(layer)
        for module in modules.values():
            reading = [other for other in modules.values() if inputs[other] is inputs[module]]
            # Each drops features of its own.
            assert module.readers == ([module] if dropout else reading)


def test_time_modules_share_what_they_read_whatever_their_dropout() -> None:
    config = AdapterConfig(
        rank=2, every_layer=("k_proj", "up_proj"), every_layer_method="ssmlora", dropout=0.1
    )
    modules = adapters_of(layers_of(add_adapters(tiny_model(num_layers=1), config))[0])
    assert modules["q_proj"].readers == modules["k_proj"].readers == [modules["q_proj"], modules["k_proj"]]
    assert modules["up_proj"].readers == [modules["up_proj"]]


@pytest.mark.parametrize("config", [QV_AND_MLP, AdapterConfig(method="lora", every_layer=("o_proj",))])
def test_every_adapter_has_a_dropout_id_of_its_own_whatever_layers_are_here(config: AdapterConfig) -> None:
    def dropout_ids(only: tuple[int, ...]) -> dict[str, int]:
        model = tiny_model()
        layers = {layer_idx: layers_of(model)[layer_idx] for layer_idx in only}
        insert_adapters(layers, config, num_layers=NUM_LAYERS, prefix=PREFIX)
        return {
            name: module.dropout_id
            for name, module in model.named_modules()
            if isinstance(module, LoRALinear)
        }

    whole, part = dropout_ids(tuple(range(NUM_LAYERS))), dropout_ids((2, 5))
    assert len(set(whole.values())) == len(whole)
    assert part == {name: whole[name] for name in part}


@pytest.mark.parametrize("training", [False, True])
def test_adapters_take_over_the_mode_of_the_layer(training: bool) -> None:
    model = add_adapters(tiny_model().train(training), QV_AND_MLP)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize(
    ("projection", "message"),
    [
        ("q_porj", r"no projection 'q_porj' \(did you mean q_proj\?\); they have q_proj, k_proj.*down_proj"),
        ("wqkv", r"no projection 'wqkv'; they have q_proj"),
        ("input_layernorm", r"no projection 'input_layernorm'"),
    ],
)
@pytest.mark.parametrize("field", ["alternate", "every_layer"])
def test_a_projection_that_the_model_lacks_is_named_with_the_nearest(
    field: str, projection: str, message: str
) -> None:
    model = tiny_model()
    settings: dict[str, Any] = {"alternate": ("v_proj",), "every_layer": ("o_proj",)}
    settings[field] = (*settings[field], projection)
    with pytest.raises(AdapterError, match=message):
        add_adapters(model, AdapterConfig(**settings))
    # Nothing was done by halves: the corrected configuration can follow.
    assert adapter_parameters(model) == {}
    add_adapters(model, QV_AND_MLP)


def test_a_model_is_adapted_once() -> None:
    model = add_adapters(tiny_model(), QV_AND_MLP)
    with pytest.raises(AdapterError, match=r"named 'default' already; .*`name`, or call remove_adapters"):
        add_adapters(model, QV_AND_MLP)


def test_a_model_without_linear_layers_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=8))
    with pytest.raises(
        ModelError, match=r"gpt2 models cannot be adapted: .*no linear layers.*; name a decoder"
    ):
        add_adapters(model)


def test_values_are_copied_by_name() -> None:
    model = add_adapters(tiny_model(), QV_AND_MLP)
    generator = torch.Generator().manual_seed(1)
    wanted = {
        name: torch.randn(p.shape, generator=generator) for name, p in adapter_parameters(model).items()
    }
    load_adapter_tensors(model, wanted, "here")
    assert_same({name: p.detach() for name, p in adapter_parameters(model).items()}, wanted)
    assert all(p.requires_grad for p in adapter_parameters(model).values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, name: t.pop(name), "here: lacks {name}; it was saved for another model or placement"),
        (
            lambda t, name: t.update({name: torch.zeros(1, 3)}),
            r"here: {name} is \[1, 3\], the model needs \[4, 24\]; it was saved for another",
        ),
        (
            lambda t, name: t.update({name.replace("5", "6"): torch.zeros(4, 24)}),
            r"here: holds {other}, which the model has no adapter for; it was saved for another",
        ),
    ],
    ids=["lacking", "shape", "unknown"],
)
def test_values_that_do_not_fit_are_refused_and_nothing_is_copied(spoil: Any, message: str) -> None:
    model = add_adapters(tiny_model(), QV_AND_MLP)
    tensors = {name: torch.ones_like(parameter) for name, parameter in adapter_parameters(model).items()}
    name = f"{PREFIX}.5.mlp.down_proj.lora_A.weight"
    spoil(tensors, name)
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    with pytest.raises(AdapterError, match=message.format(name=name, other=name.replace("5", "6"))):
        load_adapter_tensors(model, tensors, "here")
    assert_same({name: p.detach() for name, p in adapter_parameters(model).items()}, before)


def test_quantised_base_layers_stay_quantised() -> None:
    model = tiny_model(quantization="nf4")
    before = layers_of(model)[0].self_attn.q_proj
    add_adapters(model, QV_AND_MLP)
    assert layers_of(model)[0].self_attn.q_proj.base_layer is before


IN_SOME_LAYERS = AdapterConfig(rank=4, layers=(1, 4), every_layer=("down_proj",))


def test_layers_that_are_not_chosen_hand_the_state_on() -> None:
    model = adapted_model(config=IN_SOME_LAYERS)
    adapted = {name.split(".")[2] for name in adapter_parameters(model)}
    assert adapted == {"1", "4"}
    handed_on: list[Tensor] = []
    for layer in layers_of(model)[:-1]:
        layer.register_forward_hook(lambda _, __, output: handed_on.append(output[1]))
    with torch.no_grad():
        model(input_ids=token_ids(2, 9), use_cache=False)
    first, second, *_ = handed_on
    assert not first.any()
    # In layer 1 it is q_proj's turn, the first axis; in layer 4, the next that is adapted, v_proj's.
    assert second[..., 0, :].any()
    assert not second[..., 1, :].any()
    assert all(torch.equal(state, second) for state in handed_on[2:4])
    assert torch.equal(handed_on[4][..., 0, :], second[..., 0, :])
    assert handed_on[4][..., 1, :].any()


def test_a_layer_computes_as_where_all_are_adapted() -> None:
    """Adapters of the other layers that add nothing and hand nothing on are as good as none."""
    # In these layers the same names have their turn as where all are adapted.
    config = IN_SOME_LAYERS.model_copy(update={"carry": "none", "layers": (2, 5)})
    some = adapted_model(config=config)
    everywhere = add_adapters(tiny_model(), config.model_copy(update={"layers": None}))
    with torch.no_grad():
        for name, parameter in adapter_parameters(some).items():
            everywhere.get_parameter(name).copy_(parameter)
    tokens = token_ids(2, 9)
    assert torch.equal(some(input_ids=tokens).logits, everywhere(input_ids=tokens).logits)


def test_places_are_adapted_and_no_others() -> None:
    places = ("1.v_proj", "4.q_proj", "4.v_proj", "5.up_proj")
    model = adapted_model(config=AdapterConfig(rank=4, places=places))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]
    assert [name.removeprefix("model.layers.") for name in adapted] == [
        "1.self_attn.v_proj",
        "4.self_attn.q_proj",
        "4.self_attn.v_proj",
        "5.mlp.up_proj",
    ]
    assert all(layer.num_axes == 3 for layer in layers_of(model))
    # What alternates in two layers is these two places: the same axes, starts and state.
    alike = {
        "pattern": AdapterConfig(rank=4, layers=(2, 5), dropout=0.3),
        "places": AdapterConfig(rank=4, places=("2.q_proj", "5.v_proj"), dropout=0.3),
    }
    seeds = dropout_seeds(range(2), 9)
    logits = []
    for config in alike.values():
        model = adapted_model(config=config).train()
        logits.append(model(input_ids=token_ids(2, 9), dropout_seeds=seeds).logits)
    assert torch.equal(*logits)
