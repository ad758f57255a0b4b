"""One adapted linear layer against its formula, over dense and quantised layers."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlora_dist.adapters.layers import LayerCall, LoRALinear
from ssmlora_dist.adapters.state import layer_context
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops.dropout import draw_seeds, keep_mask
from ssmlora_dist.ops.lora import LoRA
from ssmlora_dist.ops.ssmlora import SSMLoRA
from ssmlora_dist.ops.ssmlora.reference import time_module
from ssmlora_dist.quantization import quantize_linear

SEED = 3
IN_FEATURES, OUT_FEATURES, RANK, ALPHA, DROPOUT_ID = 64, 32, 4, 6.0, 7
SCALING = ALPHA / RANK
STORAGES = ["dense", "nf4", "fp4", "int8"]
# Products of a few dozen terms of order 1 in float32, in another order than the layer's.
FLOAT32_TOLERANCE = 1e-5
# A few roundings to 8 bits one after the other, relative to the largest number.
BFLOAT16_TOLERANCE = 0.05


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


def plain_lora(base: nn.Linear, rank: int, *settings: Any, **others: Any) -> LoRALinear:
    return LoRALinear(base, LoRA(rank=rank), *settings, **others)


def time_module_on(
    base: nn.Linear, rank: int, *settings: Any, axis: int = 0, detach_state: bool = False, **form: Any
) -> LoRALinear:
    return LoRALinear(base, SSMLoRA(rank=rank, axis=axis, **form), *settings, detach_state=detach_state)


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


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [plain_lora, time_module_on])
@pytest.mark.parametrize("storage", STORAGES)
def test_autocast_to_another_dtype_than_that_of_the_layer(storage: str, kind: Any, grad: bool) -> None:
    """A quantised layer gives the dtype of its input all the same, where a dense one follows autocast."""
    layer = randomized(kind(base_layer(storage), RANK, ALPHA))
    x, h = tokens().requires_grad_(grad), state()
    run = (lambda: layer(x)) if kind is plain_lora else (lambda: layer.step(x, h)[0])
    wanted = run()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert got.dtype == (torch.bfloat16 if storage == "dense" else torch.float32)
    assert (got - wanted).abs().max() <= BFLOAT16_TOLERANCE * wanted.abs().max()
    if grad:
        gradients = torch.autograd.grad(got.float().square().sum(), (x, layer.lora_A.weight))
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("storage", STORAGES)
def test_lora_is_its_formula(storage: str) -> None:
    layer = randomized(plain_lora(base_layer(storage), RANK, ALPHA))
    x = tokens()
    expected = layer.base_layer(x) + SCALING * (x @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("carry", ["normalized", "raw"])
@pytest.mark.parametrize("normalization", ["minmax", "rms", "none"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_is_the_reference(storage: str, normalization: str, carry: str) -> None:
    layer = randomized(
        time_module_on(base_layer(storage), RANK, ALPHA, normalization=normalization, carry=carry)
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
    torch.testing.assert_close(y, expected_y, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    torch.testing.assert_close(carried, expected_carried, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize("detach_state", [False, True])
def test_a_detached_module_sends_no_gradient_to_the_state_it_received(detach_state: bool) -> None:
    layer = randomized(time_module_on(base_layer("dense"), RANK, ALPHA, detach_state=detach_state))
    h_prev = state().requires_grad_()
    y, carried = layer.step(tokens(), h_prev)
    (gradient,) = torch.autograd.grad((y.sum() + carried.square().sum()), h_prev, allow_unused=True)
    assert (gradient is None) == detach_state


@pytest.mark.parametrize("kind", [plain_lora, time_module_on])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_module_is_its_base_layer(kind: Any, storage: str, dtype: torch.dtype) -> None:
    layer = kind(base_layer(storage, dtype), RANK, ALPHA)
    layer.reset_parameters(torch.Generator().manual_seed(SEED))
    x = tokens(dtype)
    y = layer.step(x, torch.zeros(2, 3, RANK))[0] if kind is time_module_on else layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, layer.base_layer(x))
    assert layer.lora_A.weight.abs().max() > 0


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_parameters_are_float32_whatever_the_storage(storage: str, dtype: torch.dtype) -> None:
    layer = time_module_on(base_layer(storage, dtype), RANK, ALPHA)
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
    layer = randomized(time_module_on(base_layer("dense", torch.float64), RANK, ALPHA))
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    y, carried = layer.step(tokens(torch.float64), state(torch.float64))
    assert y.dtype == carried.dtype == torch.float64


def test_the_state_starts_small_and_not_at_zero() -> None:
    layer = time_module_on(base_layer("dense"), RANK, ALPHA, state_input_scale=0.25)
    layer.reset_parameters()
    assert torch.equal(layer.state_input, 0.25 * torch.eye(RANK))
    assert torch.equal(layer.state_transition, torch.zeros(RANK, RANK))


def test_lora_dropout_acts_on_the_input_while_training() -> None:
    dropout = 0.5
    layer = randomized(plain_lora(base_layer("dense"), RANK, ALPHA, dropout, dropout_id=DROPOUT_ID))
    x = tokens()
    torch.manual_seed(SEED)
    trained = layer.train()(x)
    torch.manual_seed(SEED)
    dropped = (
        x * keep_mask(draw_seeds(x.shape[:2], x.device), DROPOUT_ID, x.shape[-1], dropout) / (1 - dropout)
    )
    expected = layer.base_layer(x) + SCALING * (dropped @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
    torch.testing.assert_close(trained, expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    without = randomized(plain_lora(layer.base_layer, RANK, ALPHA))
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), without(x))
    assert not torch.equal(trained, without(x))


def test_state_dropout_acts_on_the_normalised_state_while_training() -> None:
    dropout = 0.25
    layer = randomized(time_module_on(base_layer("dense"), OUT_FEATURES, ALPHA, dropout))
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


def test_an_adapter_with_a_state_outside_a_layer_says_what_to_call() -> None:
    layer = randomized(time_module_on(base_layer("dense"), RANK, ALPHA))
    with pytest.raises(AdapterError, match=r"outside of its decoder layer.*`step\(x, state\)`"):
        layer(tokens())


def test_inside_a_layer_it_reads_and_writes_its_own_axis() -> None:
    layer = randomized(time_module_on(base_layer("dense"), RANK, ALPHA, axis=1))
    x, entered = tokens(), torch.randn(2, 3, 3, RANK)
    call = LayerCall(entered.shape[:2], state_BSAR=entered)
    with layer_context([layer], call):
        y = layer(x)
    expected_y, carried = layer.step(x, entered[:, :, 1])
    left = call.packed()
    assert torch.equal(y, expected_y)
    assert torch.equal(left[:, :, 1], carried)
    assert torch.equal(left[:, :, [0, 2]], entered[:, :, [0, 2]])


def test_the_state_is_let_go_when_a_layer_fails() -> None:
    layer = time_module_on(base_layer("dense"), RANK, ALPHA)

    def fail() -> None:
        with layer_context([layer], LayerCall((1, 1), state_BSAR=torch.zeros(1, 1, 1, RANK))):
            raise RuntimeError("in the layer")

    with pytest.raises(RuntimeError, match="in the layer"):
        fail()
    assert layer.call is None


def test_the_state_leaves_in_the_dtype_it_entered() -> None:
    call = LayerCall((1, 2), state_BSAR=torch.zeros(1, 2, 2, RANK, dtype=torch.bfloat16))
    raw = torch.randn(1, 2, RANK)
    call.write(1, raw)
    left = call.packed()
    assert left.dtype == torch.bfloat16
    assert left.shape == (1, 2, 2, RANK)
    assert torch.equal(left[:, :, 1], raw.bfloat16())


def test_adapters_of_one_call_share_its_seeds_and_draw_apart() -> None:
    layers = [
        randomized(plain_lora(base_layer("dense"), RANK, ALPHA, 0.5, dropout_id=s)).train() for s in (1, 2)
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = tokens()
    dropout_seeds = torch.arange(x.shape[0] * x.shape[1], dtype=torch.int32).view(x.shape[:2])
    generator_state = torch.get_rng_state()
    with layer_context(layers, LayerCall(x.shape[:2], dropout_seeds)):
        first, second = (layer(x) for layer in layers)
    with layer_context(layers, LayerCall(x.shape[:2], dropout_seeds)):
        again = layers[0](x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), generator_state), "seeds were drawn although there were some"
    with layer_context(layers, LayerCall(x.shape[:2])):
        call = layers[0].call
        drawn = call.dropout_seeds(x.device)
        assert call.dropout_seeds(x.device) is drawn
    assert not torch.equal(torch.get_rng_state(), generator_state)


def readers(number: int = 3, **settings: Any) -> list[Any]:
    """Adapters that read one input."""
    layers = [randomized(plain_lora(base_layer("dense"), RANK, ALPHA, **settings)) for _ in range(number)]
    for layer in layers:
        layer.readers = layers
    return layers


class Products(TorchDispatchMode):
    """Sizes of the second factor of every product."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.sizes.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def run_readers(layers: list[Any], inputs: list[Tensor], in_layer: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the layers on their inputs, and all gradients."""
    leaves = [*{id(x): x for x in inputs}.values(), *(m.weight for y in layers for m in (y.lora_A, y.lora_B))]
    with layer_context(layers, LayerCall(inputs[0].shape[:2])) if in_layer else nullcontext():
        outputs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, [torch.full_like(y, 0.5) for y in outputs])
    return outputs, list(gradients)


def assert_all_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE * float(b.detach().abs().max())
        )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_readers_of_one_tensor_share_one_product(requires_grad: bool) -> None:
    layers, x = readers(), tokens()
    with torch.no_grad(), Products() as alone:
        for layer in layers:
            layer(x)
    assert alone.sizes.count((IN_FEATURES, RANK)) == 3
    with torch.no_grad(), layer_context(layers, LayerCall(x.shape[:2])), Products() as together:
        for layer in layers:
            layer(x)
    assert together.sizes.count((IN_FEATURES, 3 * RANK)) == 1
    assert together.sizes.count((IN_FEATURES, RANK)) == 0
    if requires_grad:
        x.requires_grad_()
        outputs, gradients = run_readers(layers, [x] * 3, in_layer=True)
        expected, expected_gradients = run_readers(layers, [x] * 3, in_layer=False)
        assert_all_close(outputs, expected)
        assert_all_close(gradients, expected_gradients)


@pytest.mark.parametrize("order", [(0, 0, 1), (0, 1, 0), (0, 1, 2)])
def test_readers_of_other_tensors_are_served_with_these(order: tuple[int, ...]) -> None:
    """Equal numbers are not enough: the tensor itself decides."""
    layers = readers()
    different = [tokens().requires_grad_() for _ in range(3)]
    inputs = [different[index] for index in order]
    got, wanted = run_readers(layers, inputs, in_layer=True), run_readers(layers, inputs, in_layer=False)
    assert_all_close([*got[0], *got[1]], [*wanted[0], *wanted[1]])


def test_a_reader_called_twice_is_served_twice() -> None:
    layers, x = readers(2), tokens()
    with layer_context(layers, LayerCall(x.shape[:2])):
        first, second = layers[0](x), layers[0](x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("method", ["time module", "dropout"])
def test_tokens_that_a_layer_has_flattened_are_those_of_its_rows(method: str) -> None:
    make = time_module_on if method == "time module" else plain_lora
    layer = randomized(
        make(base_layer("dense"), RANK, ALPHA, 0.0 if method == "time module" else 0.5)
    ).train()
    x, seeds = tokens(), torch.arange(6, dtype=torch.int32).view(2, 3)
    state = torch.randn(2, 3, 1, RANK)
    found = []
    for given in (x, x.flatten(0, 1)):
        call = LayerCall(x.shape[:2], seeds, state)
        with layer_context([layer], call):
            found.append((layer(given), call.packed()))
    (by_row, left), (flat, left_flat) = found
    assert flat.shape == (6, OUT_FEATURES)
    assert torch.equal(flat, by_row.flatten(0, 1))
    assert torch.equal(left_flat, left)


def test_other_tokens_than_those_of_the_layer_are_refused() -> None:
    layer = randomized(time_module_on(base_layer("dense"), RANK, ALPHA))
    with (
        layer_context([layer], LayerCall((2, 3), state_BSAR=torch.zeros(2, 3, 1, RANK))),
        pytest.raises(AdapterError, match=r"called with 5 tokens.* has 2 x 3.*leave this projection out"),
    ):
        layer(tokens().flatten(0, 1)[:5])


def test_flattened_tokens_are_read_once_by_all_their_readers() -> None:
    layers, x = readers(dropout=0.0), tokens().flatten(0, 1)
    with torch.no_grad(), layer_context(layers, LayerCall((2, 3))), Products() as products:
        for layer in layers:
            layer(x)
    assert products.sizes.count((IN_FEATURES, 3 * RANK)) == 1


def test_a_call_lets_go_of_the_input_when_all_have_read_it() -> None:
    layers, x = readers(2), tokens()
    count = sys.getrefcount(x)
    call = LayerCall(x.shape[:2])
    with torch.no_grad(), layer_context(layers, call):
        layers[0](x)
        assert sys.getrefcount(x) > count
        layers[1](x)
        assert sys.getrefcount(x) == count


def test_sharded_weights_are_not_read_ahead_of_their_module() -> None:
    """ZeRO 3 marks its parameters with `ds_id`."""
    layers, x = readers(2), tokens()
    for layer in layers:
        layer.lora_A.weight.ds_id = 1
    with torch.no_grad(), layer_context(layers, LayerCall(x.shape[:2])), Products() as products:
        layers[0](x)
    assert products.sizes.count((IN_FEATURES, RANK)) == 1


def test_printing_a_module_shows_its_settings() -> None:
    assert "rank=4, scaling=1.5, dropout=0.1" in repr(plain_lora(base_layer("dense"), RANK, ALPHA, 0.1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_start_values_are_the_same_on_every_device() -> None:
    on_cpu, on_cuda = (
        time_module_on(base_layer("dense").to(device), RANK, ALPHA) for device in ("cpu", "cuda")
    )
    for layer in (on_cpu, on_cuda):
        layer.reset_parameters(torch.Generator().manual_seed(SEED))
    assert on_cuda.lora_A.weight.is_cuda
    assert torch.equal(on_cuda.lora_A.weight.cpu(), on_cpu.lora_A.weight)
