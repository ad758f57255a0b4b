"""What an adapter configuration allows, by itself."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.errors import AdapterError
from tests.tiny import tiny_model


def test_by_default_q_and_v_alternate_with_a_full_state_gradient() -> None:
    config = AdapterConfig()
    assert config.targets == ("q_proj", "v_proj")
    assert (config.method, config.rank, config.scaling) == ("ssmlora", 8, 2.0)
    assert (config.state_gradient, config.carry, config.normalization) == ("full", "normalized", "minmax")
    assert config.state_dtype is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alternate": ()}, "names no module to adapt"),
        ({"alternate": ("q_proj",), "every_layer": ("q_proj",)}, "names q_proj more than once"),
        (
            {"method": "lora", "every_layer": ("o_proj",), "every_layer_method": "ssmlora"},
            'needs `method` to be a form with one.*set `method` to "ssmlora"',
        ),
        ({"state_input_scale": 0.0}, "greater than 0"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"dropout": 1.0}, "less than 1"),
        ({"alpha": float("nan")}, "finite"),
        ({"rnak": 8}, "rnak"),
        ({"places": ("q_proj",)}, r"places\n.*'q_proj' given; allowed: LAYER\.PROJECTION"),
        ({"places": ("-1.q_proj",)}, "allowed: LAYER"),
        ({"places": ("1.q_proj", "1.q_proj")}, r"names 1\.q_proj more than once"),
        ({"places": ("1.q_proj",), "layers": "1:"}, "`places` given beside `layers`; .* drop `layers`, or"),
        (
            {"places": ("1.q_proj",), "alternate": ("q_proj",), "every_layer": ("o_proj",)},
            "drop `alternate` and `every_layer`, or drop `places`",
        ),
        (
            {"probe_parameters": 100},
            '`probe_parameters` 100 given with `placement` "pattern"; allowed: only',
        ),
        ({"probe_batches": 2}, "`probe_batches` 2 given"),
        ({"placement": "probe", "probe_parameters": 0}, "greater than or equal to 1"),
        ({"carry": "cooked"}, "'normalized', 'raw' or 'none'"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AdapterConfig(**settings)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        AdapterConfig().rank = 4  # type: ignore[misc]


def test_places_stand_alone() -> None:
    config = AdapterConfig(places=("3.v_proj", "0.q_proj", "1.v_proj"))
    assert config.targets == ("v_proj", "q_proj")
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config
    assert AdapterConfig(places=config.places, alternate=()).targets == config.targets


@pytest.mark.parametrize(
    ("settings", "methods"),
    [
        ({}, ("ssmlora",)),
        ({"every_layer": "all-linear"}, ("ssmlora", "lora")),
        ({"alternate": (), "every_layer": ("q_proj",)}, ("lora",)),
        ({"method": "lora", "every_layer": ("up_proj",)}, ("lora",)),
        ({"places": ("0.q_proj",)}, ("ssmlora",)),
    ],
)
def test_the_forms_in_use(settings: dict[str, Any], methods: tuple[str, ...]) -> None:
    assert AdapterConfig(**settings).methods == methods


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    config = AdapterConfig(rank=16, alpha=8.0)
    assert config.scaling == 0.5
    assert config.model_copy(update={"rslora": True}).scaling == 2.0
    adapted = add_adapters(tiny_model(), AdapterConfig(rank=4, alpha=8.0, rslora=True))
    assert {module.scaling for module in adapted.modules() if isinstance(module, LoRALinear)} == {4.0}


def test_a_probe_stands_for_the_pattern_until_it_has_chosen() -> None:
    config = AdapterConfig(placement="probe", probe_parameters=99, probe_batches=2, layers="-2:")
    assert config.is_unprobed
    assert config.until_probed == AdapterConfig(layers="-2:")
    chosen = config.model_copy(update={"places": ("4.q_proj",)})
    assert not chosen.is_unprobed
    assert chosen.until_probed is chosen
    assert AdapterConfig.model_validate_json(chosen.model_dump_json()) == chosen
    with pytest.raises(AdapterError, match='`placement` "probe" finds places by training data'):
        add_adapters(tiny_model(), config)
    assert add_adapters(tiny_model(), chosen).ssmlora_config == AdapterConfig(
        places=("4.q_proj",), alternate=()
    )
