"""What names of projections stand for, by PEFT's rules, in layers that need not be alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.placement import placement, time_axes
from ssmlora_dist.adapters.projections import linear_layers, resolve, shortest_name, skipped_layers
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models import decoder_layers, empty_model, load_config
from tests.decoders import bare_config

PREFIX = "model.layers"
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
ALIKE = ((*ATTENTION, *MLP),) * 3
# Recurrent layers without queries; two of one name in the middle.
MIXED = (
    ("linear_attn.in_proj", "linear_attn.out_proj", *MLP),
    ("self_attn.q_proj", "self_attn.out_proj", "cross_attn.q_proj", *MLP),
    ("linear_attn.in_proj", "linear_attn.out_proj", *MLP),
)


def every_layer(value: Any, paths: Any = ALIKE, alternate: tuple[str, ...] = ()) -> Any:
    config = AdapterConfig(alternate=alternate, every_layer=value)
    return resolve(config, PREFIX, paths).every_layer


def test_lists_stay_as_they_are() -> None:
    assert every_layer(("o_proj", "mlp.up_proj")) == ("o_proj", "mlp.up_proj")


def test_all_linear_layers_but_those_in_turn() -> None:
    everything = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert every_layer("all-linear") == everything
    assert every_layer("all-linear", alternate=("q_proj", "self_attn.v_proj")) == (
        "k_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


def test_an_expression_matches_full_names_as_a_whole() -> None:
    assert every_layer(r".*\.(q|v)_proj") == ("q_proj", "v_proj")
    assert every_layer(r"model\.layers\.\d+\.mlp\..*") == ("gate_proj", "up_proj", "down_proj")
    with pytest.raises(AdapterError, match=r"'q_proj', which matches no linear layer .*layers\.0\.self_attn"):
        every_layer("q_proj")
    with pytest.raises(AdapterError, match=r"matches mlp\.up_proj in some layers and not in layer 2"):
        every_layer(r"model\.layers\.[01]\.mlp\.up_proj")


def test_layers_that_lack_a_name_are_passed_over_and_told() -> None:
    config = AdapterConfig(alternate=(), every_layer=("in_proj", "down_proj"))
    resolved = resolve(config, PREFIX, MIXED)
    assert resolved == config
    assert skipped_layers(resolved, MIXED) == {"in_proj": [1]}


def test_what_stands_for_several_in_a_layer_is_taken_apart() -> None:
    assert every_layer(("q_proj",), MIXED) == ("self_attn.q_proj", "cross_attn.q_proj")
    assert every_layer(("out_proj",), MIXED) == ("out_proj",)
    assert shortest_name("cross_attn.q_proj", MIXED) == "cross_attn.q_proj"


@pytest.mark.parametrize(
    ("alternate", "paths", "message"),
    [
        (("q_porj",), ALIKE, r"no projection 'q_porj' \(did you mean q_proj\?\); they have q_proj, k_proj"),
        (
            ("in_proj", "down_proj"),
            (MIXED[1], MIXED[0]),
            r"puts 'in_proj' into layer 0, which has none: .*layers have \(out_proj, .*every_layer",
        ),
        (
            ("up_proj", "q_proj"),
            MIXED,
            r"'q_proj', which is self_attn.q_proj and cross_attn.q_proj in layer 1",
        ),
    ],
)
def test_in_turn_each_layer_must_have_its_one(alternate: Any, paths: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        resolve(AdapterConfig(alternate=alternate), PREFIX, paths)


def test_a_projection_is_adapted_once() -> None:
    for value, alternate in ((("self_attn.q_proj",), ("q_proj",)), (("up_proj", "mlp.up_proj"), ())):
        with pytest.raises(AdapterError, match=r"is named more than once, by '.*_proj' and '.*_proj'"):
            every_layer(value, alternate=alternate)
    with pytest.raises(AdapterError, match="q_proj is named more than once"):
        every_layer(r".*q_proj", alternate=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    "value", ["all-linear", r".*\.(down_proj|mlp\.dense_\w+|q_proj)", ["down_proj", "dense"]]
)
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "olmo_hybrid"])
def test_what_peft_adapts_is_adapted(model_type: str, value: Any) -> None:
    config = load_config(config=bare_config(model_type))
    if isinstance(value, list):
        value = [value[model_type == "gpt_neox"]]
    ours = add_adapters(empty_model(config), AdapterConfig(method="lora", alternate=(), every_layer=value))
    with torch.device("meta"):
        peft = get_peft_model(empty_model(config), LoraConfig(target_modules=value, task_type="CAUSAL_LM"))
    found = {name for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    theirs = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in peft.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert found == theirs


def test_linear_layers_of_adapted_layers_are_the_base_layers() -> None:
    model = empty_model(load_config(config=bare_config("llama")))
    before = linear_layers(decoder_layers(model)[0])
    add_adapters(model, AdapterConfig(every_layer="all-linear"))
    after = linear_layers(decoder_layers(model)[0])
    assert after.keys() == before.keys()
    assert all(after[path] is before[path] for path in before)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, None),
        ((0, 2), (0, 2)),
        ((-1, 1), (1, 5)),
        ((3, 0, -3), (0, 3)),
        ("0:2", (0, 1)),
        ("-2:", (4, 5)),
        ("::2", (0, 2, 4)),
        ("::-2", (1, 3, 5)),
        (":-4", (0, 1)),
        (":", None),
        (tuple(range(6)), None),
    ],
)
def test_layers_are_indices_or_a_slice(layers: Any, chosen: Any) -> None:
    config = AdapterConfig(layers=layers, every_layer=("down_proj",))
    resolved = resolve(config, PREFIX, ALIKE * 2)
    assert resolved.layers == chosen
    assert resolve(resolved, PREFIX, ALIKE * 2) == resolved
    placed = [placement(resolved, index) for index in range(6)]
    assert [index for index, own in enumerate(placed) if own] == list(range(6) if chosen is None else chosen)
    assert [next(iter(own)) for own in placed if own] == [
        ("q_proj", "v_proj")[turn % 2] for turn in range(len(chosen or placed))
    ]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), r"`layers` \[\] chooses none; the model has 3 layers, 0 to 2 or -3 to -1"),
        ("2:1", '`layers` "2:1" chooses none; the model has 3 layers'),
        ("5:", '`layers` "5:" chooses none; the model has 3 layers'),
        ((0, 3), "`layers` has 3; the model has 3 layers"),
        ((-4,), "`layers` has -4; the model has 3 layers"),
        ("::0", '`layers` "::0" has a step of 0; the model has 3 layers'),
    ],
)
def test_layers_that_the_model_has_not(layers: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        resolve(AdapterConfig(layers=layers), PREFIX, ALIKE)


@pytest.mark.parametrize("layers", ["", "3", "a:b", "1:2:3:4", "1.5:", "-:"])
def test_text_that_is_no_slice_is_refused(layers: str) -> None:
    with pytest.raises(ValidationError, match=r"layers\n.*a list of indices or a slice"):
        AdapterConfig(layers=layers)


def test_names_are_those_of_the_chosen_layers() -> None:
    def chosen(value: Any, alternate: tuple[str, ...] = (), layers: Any = (1,)) -> Any:
        return resolve(AdapterConfig(alternate=alternate, every_layer=value, layers=layers), PREFIX, MIXED)

    assert chosen("all-linear", layers="::2").every_layer == (
        "in_proj",
        "out_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    # Layer 1 of three is the second one's turn, and the first is in none.
    assert chosen((), ("up_proj", "self_attn.q_proj")).alternate == ("up_proj", "self_attn.q_proj")
    assert chosen(r".*self_attn\.\w+").every_layer == ("self_attn.q_proj", "out_proj")
    with pytest.raises(AdapterError, match="layers that `layers` chooses have no projection 'in_proj'"):
        chosen(("in_proj",))
    assert skipped_layers(chosen(("in_proj",), layers="::2"), MIXED) == {}
    assert skipped_layers(chosen(("in_proj",), layers="1:"), MIXED) == {"in_proj": [1]}


def test_places_come_in_the_order_of_the_model() -> None:
    given = AdapterConfig(places=("2.self_attn.v_proj", "0.down_proj", "2.q_proj", "0.q_proj"))
    resolved = resolve(given, PREFIX, ALIKE)
    assert resolved.places == ("0.q_proj", "0.down_proj", "2.q_proj", "2.v_proj")
    assert (resolved.alternate, resolved.every_layer, resolved.layers) == ((), (), None)
    assert resolve(resolved, PREFIX, ALIKE) == resolved
    assert [placement(resolved, index) for index in range(3)] == [
        {"q_proj": "ssmlora", "down_proj": "ssmlora"},
        {},
        {"q_proj": "ssmlora", "v_proj": "ssmlora"},
    ]
    assert list(time_axes(resolved)) == ["q_proj", "down_proj", "v_proj"]
    assert time_axes(resolved.model_copy(update={"method": "lora"})) == {}
    mixed = AdapterConfig(places=("1.cross_attn.q_proj", "2.out_proj", "1.out_proj"))
    assert resolve(mixed, PREFIX, MIXED).places == ("1.out_proj", "1.cross_attn.q_proj", "2.out_proj")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (("3.q_proj",), r"`places` has '3\.q_proj'; the model has 3 layers, 0 to 2; choose among these"),
        (("0.q_proj",), r"layer 0 has no projection 'q_proj' \(did you mean .*\); it has in_proj, out_proj"),
        (
            ("1.q_proj",),
            r"'1\.q_proj', which is self_attn\.q_proj and cross_attn\.q_proj in layer 1; give more",
        ),
        (("1.up_proj", "1.mlp.up_proj"), r"mlp\.up_proj of layer 1 more than once, the last time as '1\.mlp"),
    ],
)
def test_places_that_the_model_has_not(places: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        resolve(AdapterConfig(places=places), PREFIX, MIXED)
