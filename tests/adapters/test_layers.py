"""One adapted linear layer against its formula, over dense and quantised layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlora_dist.adapters.layers import LayerState, LoRALinear, SSMLoRALinear
from ssmlora_dist.adapters.state import bind_state
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops.reference import time_module
from ssmlora_dist.quantization import quantize_linear

SEED = 3
IN_FEATURES, OUT_FEATURES, RANK, ALPHA = 64, 32, 4, 6.0
SCALING = ALPHA / RANK
STORAGES = ["dense", "nf4", "fp4", "int8"]
# Products of a few dozen terms of order 1 in float32, in another order than the layer's.
FLOAT32_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(SEED)
    print(f"seed {SEED}")


def base_layer(storage: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(IN_FEATURES, OUT_FEATURES, bias=bias, dtype=dtype)
    if storage == "dense":
        return linear.requires_grad_(False)
    mode: Any = storage
    return quantize_linear(linear, mode=mode, compute_dtype=dtype)


def randomized(module: LoRALinear) -> Any:
    module.reset_parameters(torch.Generator().manual_seed(SEED))
    own = [p for name, p in module.named_parameters() if not name.startswith("base_layer")]
    with torch.no_grad():
        for parameter in own:
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return module


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, IN_FEATURES).to(dtype)


def state(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, RANK).to(dtype)


@pytest.mark.parametrize("storage", STORAGES)
def test_lora_is_its_formula(storage: str) -> None:
    layer = randomized(LoRALinear(base_layer(storage), RANK, ALPHA))
    x = tokens()
    expected = layer.base_layer(x) + SCALING * (x @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("carry", ["normalized", "raw"])
@pytest.mark.parametrize("normalization", ["minmax", "rms", "none"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_is_the_reference(storage: str, normalization: str, carry: str) -> None:
    layer = randomized(
        SSMLoRALinear(base_layer(storage), RANK, ALPHA, normalization=normalization, carry=carry)
    )
    x, h_prev = tokens(), state()
    y, carried = layer.step(x, h_prev)
    expected_y, expected_carried = time_module(
        x,
        layer.base_layer(x),
        h_prev,
        layer.lora_A.weight,
        layer.lora_B.weight,
        layer.state_transition,
        layer.state_input,
        scaling=SCALING,
        normalization=normalization,
        carry=carry,
    )
    assert torch.equal(y, expected_y)
    assert torch.equal(carried, expected_carried)


@pytest.mark.parametrize("detach_state", [False, True])
def test_a_detached_module_sends_no_gradient_to_the_state_it_received(detach_state: bool) -> None:
    layer = randomized(SSMLoRALinear(base_layer("dense"), RANK, ALPHA, detach_state=detach_state))
    h_prev = state().requires_grad_()
    y, carried = layer.step(tokens(), h_prev)
    (gradient,) = torch.autograd.grad((y.sum() + carried.square().sum()), h_prev, allow_unused=True)
    assert (gradient is None) == detach_state


@pytest.mark.parametrize("kind", [LoRALinear, SSMLoRALinear])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_module_is_its_base_layer(kind: Any, storage: str, dtype: torch.dtype) -> None:
    layer = kind(base_layer(storage, dtype), RANK, ALPHA)
    layer.reset_parameters(torch.Generator().manual_seed(SEED))
    x = tokens(dtype)
    y = layer.step(x, torch.zeros(2, 3, RANK))[0] if kind is SSMLoRALinear else layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer.base_layer(x))
    assert layer.lora_A.weight.abs().max() > 0


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_parameters_are_float32_whatever_the_storage(storage: str, dtype: torch.dtype) -> None:
    layer = SSMLoRALinear(base_layer(storage, dtype), RANK, ALPHA)
    own = {name: p for name, p in layer.named_parameters() if not name.startswith("base_layer")}
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    assert shapes == {
        "lora_A.weight": (RANK, IN_FEATURES),
        "lora_B.weight": (OUT_FEATURES, RANK),
        "state_transition": (RANK, RANK),
        "state_input": (RANK, RANK),
    }
    assert {p.dtype for p in own.values()} == {torch.float32}
    assert all(p.requires_grad for p in own.values())


def test_adapter_parameters_are_float64_under_a_float64_layer() -> None:
    layer = randomized(SSMLoRALinear(base_layer("dense", torch.float64), RANK, ALPHA))
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    y, carried = layer.step(tokens(torch.float64), state(torch.float64))
    assert y.dtype == carried.dtype == torch.float64


def test_the_state_starts_small_and_not_at_zero() -> None:
    layer = SSMLoRALinear(base_layer("dense"), RANK, ALPHA, state_input_scale=0.25)
    layer.reset_parameters()
    assert torch.equal(layer.state_input, 0.25 * torch.eye(RANK))
    assert torch.equal(layer.state_transition, torch.zeros(RANK, RANK))


def test_lora_dropout_acts_on_the_input_while_training() -> None:
    dropout = 0.5
    layer = randomized(LoRALinear(base_layer("dense"), RANK, ALPHA, dropout))
    x = tokens()
    torch.manual_seed(SEED)
    trained = layer.train()(x)
    torch.manual_seed(SEED)
    dropped = F.dropout(x, dropout)
    expected = layer.base_layer(x) + SCALING * (dropped @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    torch.testing.assert_close(trained, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    without = randomized(LoRALinear(layer.base_layer, RANK, ALPHA))
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), without(x))
    assert not torch.equal(trained, without(x))


def test_state_dropout_acts_on_the_normalised_state_while_training() -> None:
    dropout = 0.25
    layer = randomized(SSMLoRALinear(base_layer("dense"), OUT_FEATURES, ALPHA, dropout))
    with torch.no_grad():
        layer.lora_B.weight.copy_(torch.eye(OUT_FEATURES))  # y - y_0 is then scaling * (z + K n)
    x, h_prev = tokens(), torch.zeros(2, 3, OUT_FEATURES)
    evaluated, carried = layer.eval().step(x, h_prev)
    trained, carried_in_training = layer.train().step(x, h_prev)
    assert torch.equal(carried, carried_in_training)
    z = F.linear(x, layer.lora_A.weight)
    kept = (trained - layer.base_layer(x)) / layer.scaling - z
    whole = (evaluated - layer.base_layer(x)) / layer.scaling - z
    tolerance = 1e-4  # float32, after adding and subtracting numbers of order 10
    torch.testing.assert_close(whole, carried, rtol=0, atol=tolerance)
    is_kept = (kept - carried / (1 - dropout)).abs() < tolerance
    is_dropped = kept.abs() < tolerance
    assert (is_kept | is_dropped).all()
    share = is_dropped[carried > 0.01].float().mean()
    assert 0.1 < share < 0.4, f"{share:.2f} dropped, with probability {dropout}"


def test_a_time_module_outside_a_layer_says_what_to_call() -> None:
    layer = randomized(SSMLoRALinear(base_layer("dense"), RANK, ALPHA))
    with pytest.raises(AdapterError, match=r"outside of its decoder layer.*`step\(x, state\)`"):
        layer(tokens())


def test_inside_a_layer_it_reads_and_writes_its_own_axis() -> None:
    layer = randomized(SSMLoRALinear(base_layer("dense"), RANK, ALPHA, axis=1))
    x, entered = tokens(), torch.randn(2, 3, 3, RANK)
    layer_state = LayerState(entered)
    with bind_state([layer], layer_state):
        y = layer(x)
    expected_y, carried = layer.step(x, entered[:, :, 1])
    left = layer_state.packed()
    assert torch.equal(y, expected_y)
    assert torch.equal(left[:, :, 1], carried)
    assert torch.equal(left[:, :, [0, 2]], entered[:, :, [0, 2]])


def test_the_state_is_let_go_when_a_layer_fails() -> None:
    layer = SSMLoRALinear(base_layer("dense"), RANK, ALPHA)

    def fail() -> None:
        with bind_state([layer], LayerState(torch.zeros(1, 1, 1, RANK))):
            raise RuntimeError("in the layer")

    with pytest.raises(RuntimeError, match="in the layer"):
        fail()
    assert layer.layer_state is None


def test_the_state_leaves_in_the_dtype_it_entered() -> None:
    layer_state = LayerState(torch.zeros(1, 2, 2, RANK, dtype=torch.bfloat16))
    raw = torch.randn(1, 2, RANK)
    layer_state.write(1, raw)
    left = layer_state.packed()
    assert left.dtype == torch.bfloat16
    assert left.shape == (1, 2, 2, RANK)
    assert torch.equal(left[:, :, 1], raw.bfloat16())


def test_printing_a_module_shows_its_settings() -> None:
    assert "rank=4, scaling=1.5, dropout=0.1" in repr(LoRALinear(base_layer("dense"), RANK, ALPHA, 0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_start_values_are_the_same_on_every_device() -> None:
    on_cpu, on_cuda = (
        SSMLoRALinear(base_layer("dense").to(device), RANK, ALPHA) for device in ("cpu", "cuda")
    )
    for layer in (on_cpu, on_cuda):
        layer.reset_parameters(torch.Generator().manual_seed(SEED))
    assert on_cuda.lora_A.weight.is_cuda
    assert torch.equal(on_cuda.lora_A.weight.cpu(), on_cpu.lora_A.weight)
