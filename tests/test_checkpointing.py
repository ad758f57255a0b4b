"""I2: checkpointing changes neither the loss nor any gradient, bit for bit; and what would break that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from ssmlora_dist import AdapterConfig
from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import AdapterError, ModelError
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from tests.side_holder import hold_state_aside
from tests.tiny import FAMILY_NAMES, QV_AND_MLP, adapted_model, layers_of, token_ids

SEED = 23
NUM_LAYERS = 6
# Of the whole gradient of one kind of matrix, where the state is read from a side holder: far above rounding.
SPOILED_GRADIENT_ERROR = 0.1


def transformers_switch(model: Any) -> None:
    """What a user of transformers calls; its name changes in version 5."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


SWITCHES = {"ours": checkpoint_layers, "transformers": transformers_switch}


SHARED = [
    partial(checkpoint_layers, layers_per_checkpoint=number, offload=offload)
    for number, offload in ((1, True), (2, False), (3, True), (4, False), (4, True), (99, False))
]
"""Of six layers several to a checkpoint, dividing them or not; their inputs in host memory or not."""


def loss_and_gradients(model: Any, switch: Callable[[Any], None] | None = None) -> dict[str, Tensor]:
    """The loss, under the name `loss`, and the gradient of every adapter parameter."""
    if switch:
        switch(model)
    torch.manual_seed(SEED)  # of dropout
    print(f"seed {SEED}")
    tokens = token_ids(2, 9)
    loss = CausalLMLoss(model.train(), chunk_size=5)(Batch.of(tokens, input_ids=tokens))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


def assert_bitwise(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert not different, f"not the same bit for bit: {', '.join(different)}"


def relative_errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """By kind of matrix, of all time modules together."""
    errors = {}
    for kind in ("state_transition", "state_input", "lora_B", "lora_A"):
        names = [name for name in wanted if f"_proj.{kind}" in name and "down_proj" not in name]
        difference = torch.cat([(got[name] - wanted[name]).flatten() for name in names]).norm()
        errors[kind] = (difference / torch.cat([wanted[name].flatten() for name in names]).norm()).item()
    return errors


def changed(**settings: Any) -> AdapterConfig:
    return AdapterConfig.model_validate(QV_AND_MLP.model_dump() | settings)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("state_gradient", ["full", "detached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_i2_checkpointing_changes_no_bit(
    switch: Callable[[Any], None], dtype: torch.dtype, state_gradient: str, dropout: float
) -> None:
    config = changed(state_gradient=state_gradient, dropout=dropout)
    wanted = loss_and_gradients(adapted_model(config=config, dtype=dtype))
    assert_bitwise(loss_and_gradients(adapted_model(config=config, dtype=dtype), switch), wanted)
    # Every gradient is there to be compared, but for the transitions of modules that receive zeros.
    silent = {name for name, gradient in wanted.items() if not gradient.abs().max() > 0}
    first = {f"model.layers.{i}.self_attn.{p}_proj.state_transition" for i, p in enumerate("qv")}
    assert silent == first


@pytest.mark.parametrize("state_gradient", ["full", "detached"])
def test_i2_for_layers_that_share_a_checkpoint_and_for_inputs_in_host_memory(state_gradient: str) -> None:
    """Dropout with seeds of the layers' own, as no batch gives any."""
    config = changed(state_gradient=state_gradient, dropout=0.3)
    wanted = loss_and_gradients(adapted_model(config=config, dtype=torch.bfloat16))
    for switch in SHARED:
        got = loss_and_gradients(adapted_model(config=config, dtype=torch.bfloat16), switch)
        assert_bitwise(got, wanted)
    lora = AdapterConfig(method="lora", rank=4)
    wanted = loss_and_gradients(adapted_model(config=lora))
    assert_bitwise(loss_and_gradients(adapted_model(config=lora), SHARED[3]), wanted)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_i2_in_every_family(model_type: str, quantization: str) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "dtype": torch.bfloat16}
    wanted = loss_and_gradients(adapted_model(model_type, **settings))
    for switch in (checkpoint_layers, SHARED[3]):
        assert_bitwise(loss_and_gradients(adapted_model(model_type, **settings), switch), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": (1, 4)},
        {"layers": "-2:"},
        {"layers": "::2"},
        {"places": ("1.q_proj", "1.down_proj", "4.q_proj"), "every_layer": ()},
    ],
)
def test_i2_with_adapters_in_some_layers(settings: dict[str, Any]) -> None:
    config = changed(**settings)
    wanted = loss_and_gradients(adapted_model(config=config))
    assert_bitwise(loss_and_gradients(adapted_model(config=config), checkpoint_layers), wanted)


@pytest.mark.parametrize("carry", ["normalized", "raw"])
@pytest.mark.parametrize("normalization", ["minmax", "rms", "none"])
def test_i2_in_every_form_of_the_recurrence(normalization: str, carry: str) -> None:
    everywhere = {"every_layer_method": "ssmlora", "state_dtype": "bfloat16"}
    config = changed(normalization=normalization, carry=carry, **everywhere)
    wanted = loss_and_gradients(adapted_model(config=config))
    assert_bitwise(loss_and_gradients(adapted_model(config=config), checkpoint_layers), wanted)


def test_i2_compares_gradients_that_went_through_the_state() -> None:
    """Early `state_input` would get another gradient if the state were detached on the way."""
    full = loss_and_gradients(adapted_model(config=changed(state_gradient="full")))
    detached = loss_and_gradients(adapted_model(config=changed(state_gradient="detached")))
    assert torch.equal(full["loss"], detached["loss"])
    for layer_idx, projection in enumerate(("q_proj", "v_proj", "q_proj", "v_proj")):
        name = f"model.layers.{layer_idx}.self_attn.{projection}.state_input"
        difference = (full[name] - detached[name]).norm() / full[name].norm()
        assert difference > 0.01, f"{name}: {difference:.1e}"
    for layer_idx, projection in ((4, "q_proj"), (5, "v_proj")):
        name = f"model.layers.{layer_idx}.self_attn.{projection}.state_input"
        assert torch.equal(full[name], detached[name]), "nothing receives the last states of an axis"


@pytest.mark.parametrize("detach", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_i2_catches_a_state_read_from_a_side_holder(switch: Callable[[Any], None], detach: bool) -> None:
    def spoiled() -> Any:
        model = adapted_model()
        hold_state_aside(model, detach=detach)
        return model

    config = changed(state_gradient="detached" if detach else "full")
    wanted = loss_and_gradients(spoiled())
    # Without checkpointing the side holder computes what the explicit state does: nothing shows.
    assert_bitwise(wanted, loss_and_gradients(adapted_model(config=config)))
    try:
        got = loss_and_gradients(spoiled(), switch)
    except CheckpointError:
        return  # an error is as good as a difference
    assert torch.equal(got["loss"], wanted["loss"])
    with pytest.raises(AssertionError, match="state_transition"):
        assert_bitwise(got, wanted)
    errors = relative_errors(got, wanted)
    print({kind: f"{error:.2f}" for kind, error in errors.items()})
    assert min(errors.values()) > SPOILED_GRADIENT_ERROR, errors


def test_reentrant_checkpointing_is_an_error_rather_than_a_wrong_gradient() -> None:
    """It does not see tensors inside a tuple, so no gradient would come through."""
    model = adapted_model()
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(AdapterError, match=r"reentrant.*`gradient_checkpointing_kwargs=.*False"):
        loss_and_gradients(model)


@pytest.mark.parametrize("switch", [None, *SWITCHES.values()], ids=["off", *SWITCHES])
def test_a_layer_runs_twice_with_checkpointing_and_once_without(switch: Callable[[Any], None] | None) -> None:
    model = adapted_model()
    calls: list[tuple[int, str]] = []
    for layer_idx, layer in enumerate(layers_of(model)):
        for part in ("input_layernorm", "mlp.down_proj"):
            layer.get_submodule(part).register_forward_pre_hook(
                lambda *_, call=(layer_idx, part): calls.append(call)
            )
    loss_and_gradients(model, switch)
    times = 2 if switch else 1
    assert {call: calls.count(call) for call in calls} == {
        (layer_idx, part): times
        for layer_idx in range(NUM_LAYERS)
        for part in ("input_layernorm", "mlp.down_proj")
    }
    # The recompute goes from the last layer to the first.
    expected = [*range(NUM_LAYERS), *reversed(range(NUM_LAYERS))] if switch else [*range(NUM_LAYERS)]
    assert [layer_idx for layer_idx, part in calls if part == "input_layernorm"] == expected


def test_layers_that_share_a_checkpoint_are_recomputed_together() -> None:
    model = adapted_model()
    calls: list[int] = []
    for layer_idx, layer in enumerate(layers_of(model)):
        layer.input_layernorm.register_forward_pre_hook(lambda *_, index=layer_idx: calls.append(index))
    loss_and_gradients(model, partial(checkpoint_layers, num_kept=1, layers_per_checkpoint=2))
    assert calls == [0, 1, 2, 3, 4, 5, 4, 2, 3, 0, 1]


def test_a_model_that_looks_between_its_layers_is_told_so() -> None:
    model = adapted_model(config=AdapterConfig(method="lora", rank=4)).train()
    checkpoint_layers(model, layers_per_checkpoint=2)
    layers_of(model)[1].register_forward_pre_hook(lambda _, inputs: inputs[0].norm())
    with pytest.raises(ModelError, match=r"layers_per_checkpoint.*between its decoder layers \(norm\)"):
        model(token_ids(1, 4))
