"""The decoder layer as a function (hidden, state) -> (hidden, state), and the chain that such layers form."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.state import StatefulDecoderLayer
from tests.tiny import FAMILY_NAMES, QV_AND_MLP, adapted_model, layers_of, token_ids

NUM_LAYERS = 6
EVERYWHERE = AdapterConfig(rank=4, every_layer=("o_proj", "up_proj"), every_layer_method="ssmlora")


class Recorder:
    """What entered and left each decoder layer, and the input and output of each time module."""

    def __init__(self, model: Any) -> None:
        self.layers: list[tuple[Any, dict[str, Any], Any]] = []
        self.modules: dict[str, list[tuple[LoRALinear, Tensor, Tensor]]] = {}
        for layer in layers_of(model):
            layer.register_forward_hook(self._layer, with_kwargs=True)
            for name, module in layer.named_modules():
                if isinstance(module, LoRALinear) and module.form.has_state:
                    axis = self.modules.setdefault(name.rpartition(".")[2], [])
                    module.register_forward_hook(
                        lambda module, inputs, output, axis=axis: axis.append((module, inputs[0], output))
                    )

    def _layer(self, _: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.layers.append((inputs[0], kwargs, output))


def recorded(
    config: AdapterConfig = QV_AND_MLP, model_type: str = "llama", **settings: Any
) -> tuple[Any, Recorder]:
    model = adapted_model(model_type, config, **settings)
    recorder = Recorder(model)
    with torch.no_grad():
        model(token_ids(2, 7), use_cache=False)
    return model, recorder


@pytest.mark.parametrize("carry", ["normalized", "raw"])
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_axis_is_the_recurrence_along_depth(model_type: str, carry: Any) -> None:
    """Each module's output is that of `step` on its own input and the state of the module before it."""
    config = EVERYWHERE.model_copy(update={"carry": carry})
    _, recorder = recorded(config, model_type)
    assert {axis: len(calls) for axis, calls in recorder.modules.items()} == {
        "q_proj": 3,
        "v_proj": 3,
        "o_proj": 6,
        "up_proj": 6,
    }
    for axis, calls in recorder.modules.items():
        state = torch.zeros(2, 7, 4)
        for depth, (module, x, y) in enumerate(calls):
            with torch.no_grad():
                expected, carried = module.step(x, state)
                without_state, _ = module.step(x, torch.zeros_like(state))
            assert torch.equal(y, expected), f"{axis}, module {depth}"
            assert torch.equal(without_state, y) == (depth == 0), (
                f"{axis}, module {depth}: the state does nothing"
            )
            state = carried


def test_what_passes_between_layers_are_hidden_states_and_state() -> None:
    _, recorder = recorded()
    assert [isinstance(entered, tuple) for entered, _, _ in recorder.layers] == [False] + [True] * 5
    assert [isinstance(left, tuple) for _, _, left in recorder.layers] == [True] * 5 + [False]
    for (_, _, left), (entered, _, _) in pairwise(recorder.layers):
        assert left[0] is entered[0]
        assert left[1] is entered[1]
        assert left[0].shape == (2, 7, 16)
        assert left[1].shape == (2, 7, 2, 4)


def test_a_layer_hands_on_the_axes_that_it_has_no_module_of() -> None:
    _, recorder = recorded()
    states = [torch.zeros(2, 7, 2, 4)] + [left[1] for _, _, left in recorder.layers[:-1]]
    for layer_idx, (before, after) in enumerate(pairwise(states)):
        own, other = layer_idx % 2, 1 - layer_idx % 2
        assert not torch.equal(before[:, :, own], after[:, :, own])
        assert torch.equal(before[:, :, other], after[:, :, other])


@pytest.mark.parametrize("cut", range(1, NUM_LAYERS))
def test_the_layers_can_be_run_in_two_parts(cut: int) -> None:
    """Hidden states and state are all that the second part needs, wherever the cut is."""
    model, recorder = recorded(dtype=torch.bfloat16)
    kwargs = recorder.layers[0][1]
    sent = recorder.layers[cut - 1][2]
    second_part = copy.deepcopy(layers_of(model)[cut:])
    hidden_and_state: Any = tuple(tensor.clone() for tensor in sent)
    with torch.no_grad():
        for layer in second_part:
            hidden_and_state = layer(hidden_and_state, **kwargs)
    assert torch.equal(hidden_and_state, recorder.layers[-1][2])


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float64, None, torch.float64),
    ],
)
def test_between_layers_the_state_has_one_dtype(
    dtype: torch.dtype, state_dtype: Any, expected: torch.dtype
) -> None:
    config = QV_AND_MLP.model_copy(update={"state_dtype": state_dtype})
    _, recorder = recorded(config, dtype=dtype)
    assert {left[1].dtype for _, _, left in recorder.layers[:-1]} == {expected}
    assert {left[0].dtype for _, _, left in recorder.layers[:-1]} == {dtype}


def test_every_forward_pass_starts_anew() -> None:
    model = adapted_model()
    first, other = token_ids(2, 7), token_ids(2, 7, seed=1)
    with torch.no_grad():
        expected = model(first, use_cache=False).logits
        model(other, use_cache=False)
        assert torch.equal(model(first, use_cache=False).logits, expected)


def test_nothing_of_the_state_outlives_a_forward_pass() -> None:
    model = adapted_model()
    model(token_ids(2, 7), use_cache=False)
    held = [name for name, value in _attributes(model) if isinstance(value, Tensor)]
    assert held == []
    assert all(m.call is None for m in model.modules() if isinstance(m, LoRALinear))


def test_a_layer_that_fails_lets_go_of_its_state() -> None:
    model = adapted_model()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the layer")

    hook = layers_of(model)[3].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the layer"):
        model(token_ids(2, 7), use_cache=False)
    hook.remove()
    assert all(m.call is None for m in model.modules() if isinstance(m, LoRALinear))
    assert torch.equal(
        model(token_ids(2, 7), use_cache=False).logits,
        adapted_model()(token_ids(2, 7), use_cache=False).logits,
    )


def test_layers_keep_their_class_and_names() -> None:
    model = adapted_model()
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    for layer in layers_of(model):
        assert isinstance(layer, LlamaDecoderLayer)
        assert isinstance(layer, StatefulDecoderLayer)
        assert [name for name, _ in layer.named_children()] == [
            "self_attn",
            "mlp",
            "input_layernorm",
            "post_attention_layernorm",
        ]


def test_a_copy_has_time_modules_of_its_own() -> None:
    model = adapted_model()
    copied = copy.deepcopy(model)
    expected = model(token_ids(2, 7), use_cache=False).logits
    for layer, original in zip(layers_of(copied), layers_of(model), strict=True):
        own = set(layer.modules())
        assert all(module in own for module in layer.adapters)
        assert not own & set(original.modules())
    with torch.no_grad():
        layers_of(model)[0].self_attn.q_proj.state_input.zero_()
    assert torch.equal(copied(token_ids(2, 7), use_cache=False).logits, expected)
    assert not torch.equal(model(token_ids(2, 7), use_cache=False).logits, expected)


def _attributes(model: Any) -> Iterator[tuple[str, Any]]:
    """Plain attributes of all modules: neither parameters, nor buffers, nor modules."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield f"{path}.{name}", value
