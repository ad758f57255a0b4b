"""Quantised linear layers: the numbers of bitsandbytes, exact gradients, weights that stay as they are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmlora_dist.errors import ModelError
from ssmlora_dist.quantization import (
    QuantizationMode,
    dequantized_weight,
    is_quantized,
    quantize_linear,
)
from ssmlora_dist.quantization import linear as linear_module
from ssmlora_dist.quantization.linear import bitsandbytes

MODES = get_args(QuantizationMode)
DTYPES = [torch.float32, torch.bfloat16]
IN_FEATURES, OUT_FEATURES, NUM_TOKENS = 128, 64, 5


@pytest.fixture(autouse=True)
def seed() -> int:
    value = 20
    torch.manual_seed(value)
    print(f"seed {value}")
    return value


def dense(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(IN_FEATURES, OUT_FEATURES, bias=bias, dtype=dtype)


def tokens(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, NUM_TOKENS, IN_FEATURES).to(dtype)


def output_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), gradient


def bitsandbytes_layer(linear: nn.Linear, mode: str, double_quantization: bool, dtype: torch.dtype) -> Any:
    """What bitsandbytes itself makes of `linear`, in training mode, where it does not repack."""
    import bitsandbytes as bnb

    bias = linear.bias is not None
    if mode == "int8":
        layer = bnb.nn.Linear8bitLt(IN_FEATURES, OUT_FEATURES, bias, has_fp16_weights=False, threshold=0.0)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.to(dtype), requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(
            IN_FEATURES, OUT_FEATURES, bias, dtype, compress_statistics=double_quantization, quant_type=mode
        )
        layer.weight.data = linear.weight.data.to(dtype)
    if bias:
        layer.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return layer.to("cpu").train()


@pytest.mark.parametrize("double_quantization", [True, False])
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_rows_that_end_within_a_block_are_dequantised_right(mode: Any, double_quantization: bool) -> None:
    """On CPUs bitsandbytes 0.50.2 mixes up their scales: weights are off by more than the largest one."""
    linear = nn.Linear(32, 6, bias=False)
    whole = nn.Linear(192, 1, bias=False)
    whole.weight.data.copy_(linear.weight.data.view(1, -1))
    layer, expected = (
        quantize_linear(each, mode=mode, double_quantization=double_quantization, compute_dtype=torch.float32)
        for each in (linear, whole)
    )
    weight = dequantized_weight(layer)
    assert torch.equal(weight.view(1, -1), dequantized_weight(expected))
    x = torch.randn(3, 32)
    output, gradient = output_and_gradient(layer, x)
    assert torch.equal(output, x @ weight.T)
    assert torch.equal(gradient, torch.ones_like(output) @ weight)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_a_weight_in_chunks_is_quantised_as_a_whole(
    mode: Any,
    double_quantization: bool,
    dtype: torch.dtype,
    storage: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three chunks and a last one that ends within a block.
    monkeypatch.setattr(linear_module, "CHUNK_SIZE", 1024)
    linear = nn.Linear(88, 36, bias=False)
    packed, state = bitsandbytes().functional.quantize_4bit(
        linear.weight.detach().to(dtype),
        blocksize=64,
        compress_statistics=double_quantization,
        quant_type=mode,
        quant_storage=storage,
    )
    layer: Any = quantize_linear(
        linear,
        mode=mode,
        double_quantization=double_quantization,
        compute_dtype=dtype,
        quant_storage=storage,
    )
    assert torch.equal(layer.weight.view(torch.uint8), packed.view(torch.uint8))
    expected, found = state.as_dict(), layer.quant_state.as_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(value, found[name]) if isinstance(value, Tensor) else value == found[name]
        assert same, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradient_are_those_of_bitsandbytes(
    mode: Any, double_quantization: bool, bias: bool, dtype: torch.dtype
) -> None:
    linear, x = dense(bias), tokens(dtype)
    ours = quantize_linear(linear, mode=mode, double_quantization=double_quantization, compute_dtype=dtype)
    y, gradient = output_and_gradient(ours, x)
    expected_y, expected_gradient = output_and_gradient(
        bitsandbytes_layer(linear, mode, double_quantization, dtype), x
    )
    assert torch.equal(y, expected_y)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_the_dequantised_weight(mode: Any) -> None:
    layer = quantize_linear(dense(), mode=mode, compute_dtype=torch.float32)
    x = tokens(torch.float32)
    _, gradient = output_and_gradient(layer, x)
    expected = torch.ones(2, NUM_TOKENS, OUT_FEATURES) @ dequantized_weight(layer)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_an_evaluation_changes_neither_gradients_nor_weights(
    mode: Any, no_gradients: Callable[[], Any]
) -> None:
    linear, x = dense(), tokens(torch.bfloat16)
    untouched, layer = quantize_linear(linear, mode=mode).train(), quantize_linear(linear, mode=mode).train()
    packed = layer.weight.detach().view(torch.uint8).clone()
    output_and_gradient(layer, x)
    layer.eval()
    with no_gradients():
        evaluated = layer(x)
    layer.train()
    y, gradient = output_and_gradient(layer, x)
    expected_y, expected_gradient = output_and_gradient(untouched, x)
    assert torch.equal(layer.weight.detach().view(torch.uint8), packed)
    assert torch.equal(evaluated, expected_y)
    assert torch.equal(y, expected_y)
    assert torch.equal(gradient, expected_gradient)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_input_of_another_dtype_is_computed_in_the_compute_dtype(mode: Any) -> None:
    layer = quantize_linear(dense(), mode=mode, compute_dtype=torch.bfloat16)
    x = tokens(torch.bfloat16)
    assert torch.equal(layer(x.float()), layer(x).float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_packed_weight_is_stored_as_the_compute_dtype(mode: Any, dtype: torch.dtype) -> None:
    layer = quantize_linear(dense(), mode=mode, compute_dtype=dtype)
    bits = 8 if mode == "int8" else 4
    assert layer.weight.dtype == dtype
    assert layer.weight.numel() * dtype.itemsize * 8 == IN_FEATURES * OUT_FEATURES * bits
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    stored_as_bytes = quantize_linear(dense(), mode=mode, compute_dtype=dtype, quant_storage=torch.uint8)
    assert stored_as_bytes.weight.dtype == torch.uint8


@pytest.mark.parametrize("mode", MODES)
def test_storage_does_not_show_in_any_number(mode: Any) -> None:
    linear, x = dense(), tokens(torch.bfloat16)
    results = [
        output_and_gradient(quantize_linear(linear, mode=mode, quant_storage=storage), x)
        for storage in (torch.uint8, torch.bfloat16)
    ]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casting_the_module_leaves_every_bit(mode: Any, cast: Callable[[nn.Module], nn.Module]) -> None:
    x = tokens(torch.bfloat16)
    layer = quantize_linear(dense(), mode=mode)
    expected = output_and_gradient(layer, x)
    converted = cast(nn.Sequential(layer))[0]
    assert all(parameter.dtype == torch.bfloat16 for parameter in converted.parameters())
    result = output_and_gradient(converted, x)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("mode", MODES)
def test_copies_are_independent_and_equal(mode: Any) -> None:
    x = tokens(torch.bfloat16)
    layer = quantize_linear(dense(), mode=mode)
    expected, gradient = output_and_gradient(layer, x)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
        for statistics in (layer.scale,) if mode == "int8" else (layer.quant_state.absmax,):
            statistics.zero_()
    result = output_and_gradient(copied, x)
    assert torch.equal(result[0], expected)
    assert torch.equal(result[1], gradient)


@pytest.mark.parametrize("mode", MODES)
def test_moving_takes_the_scales_along(mode: Any) -> None:
    moved = nn.Sequential(quantize_linear(dense(), mode=mode)).to("meta")[0]
    state = {"scale": moved.scale} if mode == "int8" else vars(moved.quant_state)
    devices = {value.device.type for value in state.values() if isinstance(value, Tensor)}
    assert devices == {"meta"}
    assert moved.weight.device.type == moved.bias.device.type == "meta"


@contextlib.contextmanager
def gathered(layer: nn.Linear, full: Tensor) -> Iterator[None]:
    """As ZeRO 3: the parameter has its data inside the block only."""
    layer.weight.data = full.clone()
    yield
    layer.weight.data = torch.empty(0, dtype=full.dtype)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_may_be_emptied_between_forward_and_backward(mode: Any, checkpointed: bool) -> None:
    layer, x = quantize_linear(dense(), mode=mode), tokens(torch.bfloat16)
    expected = output_and_gradient(layer, x)
    full = layer.weight.data
    layer.weight.data = torch.empty(0, dtype=full.dtype)
    x.requires_grad_()
    with gathered(layer, full):
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    with gathered(layer, full):
        y.backward(torch.ones_like(y))
    assert torch.equal(y, expected[0])
    assert torch.equal(x.grad, expected[1])
    assert layer.weight.numel() == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_graph_holds_neither_input_nor_a_copy_of_the_weight(mode: Any) -> None:
    layer, saved = quantize_linear(dense(), mode=mode), []
    x = tokens(torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert [tensor.data_ptr() for tensor in saved] == [layer.weight.data_ptr()]
    held = [value for value in vars(y.grad_fn).values() if isinstance(value, Tensor | tuple | list)]
    assert held == []


@pytest.mark.parametrize("mode", MODES)
def test_quantisation_error_is_that_of_its_bits(mode: Any) -> None:
    # Largest gap between neighbouring codes, over 2: 0.28/2 (NF4), 0.33/2 (FP4), 1/254 (int8), of the largest
    # weight in the block; the slack covers double quantisation and rounding to bfloat16.
    bound = {"nf4": 0.16, "fp4": 0.19, "int8": 0.01}[mode]
    linear = dense(bias=False)
    layer = quantize_linear(linear, mode=mode)
    error = (dequantized_weight(layer).float() - linear.weight).abs().max() / linear.weight.abs().max()
    assert 0 < error < bound, f"relative error {error:.4f}"


def test_dense_layers_are_told_apart() -> None:
    linear = dense()
    assert not is_quantized(linear)
    assert torch.equal(dequantized_weight(linear), linear.weight)
    layer = quantize_linear(linear, mode="nf4")
    assert is_quantized(layer)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (IN_FEATURES, OUT_FEATURES)


def test_the_source_is_left_as_it_was() -> None:
    linear = dense()
    before = linear.weight.detach().clone()
    quantize_linear(linear, mode="int8", compute_dtype=torch.float32)
    assert torch.equal(linear.weight, before)
    assert linear.weight.requires_grad


def test_int8_rows_of_zeros_stay_zero() -> None:
    linear = dense(bias=False)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = quantize_linear(linear, mode="int8")
    assert torch.equal(dequantized_weight(layer)[3], torch.zeros(IN_FEATURES, dtype=torch.bfloat16))
    assert torch.equal(
        layer(tokens(torch.bfloat16))[..., 3], torch.zeros(2, NUM_TOKENS, dtype=torch.bfloat16)
    )


def test_sizes_that_do_not_fill_the_storage_are_refused() -> None:
    with pytest.raises(ModelError, match="3 x 5 weights"):
        quantize_linear(nn.Linear(5, 3), mode="nf4", compute_dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_output_and_gradient_agree_with_the_dequantised_weight(mode: Any) -> None:
    # Sums of 128 products, rounded to bfloat16 in another order than the reference's.
    tolerance = 2e-2
    layer = quantize_linear(dense().to("cuda"), mode=mode)
    x = tokens(torch.bfloat16).to("cuda")
    y, gradient = output_and_gradient(layer, x)
    weight = dequantized_weight(layer).float()
    torch.testing.assert_close(
        y.float(), F.linear(x.float(), weight, layer.bias.float()), rtol=tolerance, atol=tolerance
    )
    expected = torch.ones(2, NUM_TOKENS, OUT_FEATURES, device="cuda") @ weight
    torch.testing.assert_close(gradient.float(), expected, rtol=tolerance, atol=tolerance)
    on_cpu = layer.to("cpu")
    torch.testing.assert_close(on_cpu(x.cpu()), y.cpu(), rtol=tolerance, atol=tolerance)
