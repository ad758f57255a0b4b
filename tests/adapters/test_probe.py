"""Where a probe spends its parameters: greedily by score for each, spread over depth."""

from __future__ import annotations

from typing import Any

import pytest

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.probe import candidate_places, candidates, choose_places
from ssmlora_dist.models import decoder_layers, structure_of
from tests.tiny import tiny_model

SCORES = {"0.q": 9.0, "0.v": 8.0, "0.up": 14.0, "1.q": 1.0, "1.v": 3.0, "1.up": 2.0, "2.q": 7.0, "2.v": 0.0}
SIZES = {name: 20 if name.endswith("up") else 10 for name in SCORES}


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (9, ()),
        (10, ("0.q",)),
        (29, ("0.q", "2.q")),
        # Every layer has one before any has a second, however good.
        (30, ("0.q", "1.v", "2.q")),
        (40, ("0.q", "0.v", "1.v", "2.q")),
        (50, ("0.q", "0.v", "1.q", "1.v", "2.q")),
        (60, ("0.q", "0.v", "1.q", "1.v", "2.q", "2.v")),
        # 0.up is worth more for each parameter than 1.up.
        (85, ("0.q", "0.v", "0.up", "1.q", "1.v", "2.q", "2.v")),
        (1000, tuple(SCORES)),
    ],
)
def test_the_best_are_chosen_layer_by_layer(budget: int, chosen: tuple[str, ...]) -> None:
    assert choose_places(SCORES, SIZES, budget) == chosen
    assert sum(SIZES[name] for name in chosen) <= budget


def test_what_does_not_fit_leaves_room_for_what_does() -> None:
    scores, sizes = {"0.up": 9.0, "0.q": 1.0, "1.up": 5.0}, {"0.up": 30, "0.q": 10, "1.up": 30}
    assert choose_places(scores, sizes, 20) == ("0.q",)
    assert choose_places(scores, sizes, 45) == ("0.up", "0.q")
    assert choose_places(scores, sizes, 60) == ("0.up", "1.up")


def test_of_equal_places_the_first_in_the_model_is_chosen() -> None:
    scores = dict.fromkeys(("2.q", "2.v", "10.q"), 0.0)
    assert choose_places(scores, dict.fromkeys(scores, 1), 1) == ("2.q",)
    assert choose_places(scores, dict.fromkeys(scores, 1), 2) == ("2.q", "10.q")


@pytest.mark.parametrize("method", ["lora", "ssmlora", "gated"])
@pytest.mark.parametrize("layers", [None, (1, -1)])
def test_sizes_are_those_of_the_adapters(method: str, layers: Any) -> None:
    config = AdapterConfig(method=method, rank=3, layers=layers, placement="probe")
    model = tiny_model()
    found = candidate_places(config, decoder_layers(model), structure_of(model).linears)
    assert len(found) == 7 * (6 if layers is None else 2)
    for place in ("1.k_proj", "5.down_proj"):
        module, size = found[place]
        adapted = adapter_parameters(
            add_adapters(tiny_model(), AdapterConfig(method=method, rank=3, places=(place,)))
        )
        assert sum(parameter.numel() for parameter in adapted.values()) == size
        assert all(name.startswith(f"model.layers.{module}.") for name in adapted)
    every = add_adapters(tiny_model(), candidates(config))
    modules = {name.rpartition(".lora_")[0] for name in adapter_parameters(every)}
    assert modules == {f"model.layers.{module}" for module, _ in found.values()}
