"""Which projection of which layer gets which adapter, and what that costs on Llama-2-7B."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.placement import placement, time_axes
from tests.tiny import tiny_model

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MLP_AND_OUTPUT = ("o_proj", "gate_proj", "up_proj", "down_proj")


def test_alternating_projections_take_turns() -> None:
    config = AdapterConfig(alternate=("q_proj", "v_proj", "o_proj"))
    assert [placement(config, layer_idx) for layer_idx in range(4)] == [
        {"q_proj": "ssmlora"},
        {"v_proj": "ssmlora"},
        {"o_proj": "ssmlora"},
        {"q_proj": "ssmlora"},
    ]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("::2", ["0.q_proj", "2.v_proj", "4.q_proj"]),
        ((5, 1, -4), ["1.q_proj", "2.v_proj", "5.q_proj"]),
        (None, ["0.q_proj", "1.v_proj", "2.q_proj", "3.v_proj", "4.q_proj", "5.v_proj"]),
    ],
)
def test_turns_are_taken_over_the_layers_that_are_adapted(layers: Any, expected: list[str]) -> None:
    model = add_adapters(tiny_model(num_layers=6), AdapterConfig(method="lora", rank=2, layers=layers))
    adapted = [name.split(".") for name in adapter_parameters(model) if name.endswith("lora_A.weight")]
    assert [f"{parts[2]}.{parts[4]}" for parts in adapted] == expected


@pytest.mark.parametrize("every_layer_method", ["lora", "ssmlora"])
def test_projections_of_every_layer_are_what_is_asked_for(every_layer_method: Any) -> None:
    config = AdapterConfig(every_layer=("up_proj",), every_layer_method=every_layer_method)
    assert placement(config, 0) == {"q_proj": "ssmlora", "up_proj": every_layer_method}
    assert placement(config, 1) == {"v_proj": "ssmlora", "up_proj": every_layer_method}


def test_lora_places_plain_modules_at_the_same_places() -> None:
    config = AdapterConfig(method="lora", every_layer=("up_proj",))
    assert placement(config, 1) == {"v_proj": "lora", "up_proj": "lora"}
    only_every_layer = AdapterConfig(method="lora", alternate=(), every_layer=("q_proj",))
    assert placement(only_every_layer, 5) == {"q_proj": "lora"}


def test_time_axes_are_the_projections_with_time_modules() -> None:
    assert tuple(time_axes(AdapterConfig(every_layer=("o_proj",)))) == ("q_proj", "v_proj")
    dense = AdapterConfig(every_layer=("o_proj", "up_proj"), every_layer_method="ssmlora")
    assert tuple(time_axes(dense)) == ("q_proj", "v_proj", "o_proj", "up_proj")
    assert time_axes(AdapterConfig(method="lora", every_layer=("o_proj",))) == {}


@pytest.fixture
def llama_2_7b() -> Any:
    """Shapes alone: no tensor has storage."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("settings", "num_trainable"),
    [
        ({"method": "lora", "alternate": (), "every_layer": ALL_PROJECTIONS}, 19_988_480),
        ({"every_layer": MLP_AND_OUTPUT}, 15_798_272),
        ({"every_layer": MLP_AND_OUTPUT, "every_layer_method": "ssmlora"}, 15_814_656),
        ({"method": "lora", "alternate": (), "every_layer": ("q_proj", "v_proj")}, 4_194_304),
        ({}, 2_101_248),
    ],
    ids=["lora", "ssmlora_and_lora", "ssmlora_everywhere", "lora_qv", "ssmlora_qv"],
)
def test_trainable_parameters_of_llama_2_7b(
    llama_2_7b: Any, settings: dict[str, Any], num_trainable: int
) -> None:
    add_adapters(llama_2_7b, AdapterConfig(rank=8, **settings))
    trainable = [parameter for parameter in llama_2_7b.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == num_trainable
    assert {id(parameter) for parameter in trainable} == {
        id(parameter) for parameter in adapter_parameters(llama_2_7b).values()
    }
    assert all(parameter.is_meta for parameter in llama_2_7b.parameters())
