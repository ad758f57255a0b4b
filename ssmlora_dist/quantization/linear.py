"""Frozen linear layers whose weight is stored in 4 or 8 bits.

bitsandbytes quantises, dequantises and multiplies; the layers around it are our own, for four reasons:
- its `Linear4bit` repacks the weight at the first evaluation on a CPU with avx512_bf16, after which training
  passes give no gradient to their input, silently. Here no pass changes the weight, in any mode;
- its autograd functions keep the input (int8) and a view of the weight (4-bit) as attributes of the graph's
  node, out of reach of gradient checkpointing and of ZeRO 3, which could free neither;
- its int8 layer rounds its input to int8 in some modes and on some devices and not in others. Here the layer
  is one function, y = x W^T with W dequantised, in training and evaluation, on CPU and CUDA, so its
  gradient is exact;
- its weight tensors quantise themselves when moved. Here the weight is an ordinary parameter, which any
  engine may move, empty and fill again.
"""

from __future__ import annotations

import copy
import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlora_dist.errors import ModelError
from ssmlora_dist.quantization.operators import BLOCK_SIZE, NESTED_BLOCK_SIZE

QuantizationMode = Literal["nf4", "fp4", "int8"]

CHUNK_SIZE = 2**20  # weights quantised at a time on a CPU: whole blocks, and whole elements of any storage
INT8_MAX = 127.0
QUANTIZABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class QuantizedLinear(nn.Linear, ABC):
    """Base of the frozen quantised layers: y = x W^T + bias, differentiable in x only.

    `weight` holds the packed bytes [n,1], viewed as the storage dtype, so that a sharding engine that
    expects one floating dtype takes it; its values mean nothing as numbers. Moving the layer moves it, and
    casting the layer leaves every bit as it is.

    Args:
        in_features: D.
        out_features: O.
        packed: the packed weight [n,1], in the storage dtype.
        bias: [O] or None.
        compute_dtype: dtype in which the product is computed.

    Attributes:
        is_recomputed: whether training passes run under gradient checkpointing: see
            `keep_weights_of_recompute`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        self.compute_dtype = compute_dtype
        self.is_recomputed = False
        self.weight = nn.Parameter(packed, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(compute_dtype), requires_grad=False)

    @abstractmethod
    def dequantize(self, packed: Tensor) -> Tensor:
        """The weight [O,D] in the compute dtype, from `packed` [n,1]."""

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, [...,D] -> [...,O]; records no gradient."""
        return F.linear(x, self.dequantize(packed), bias)

    def forward(self, input: Tensor) -> Tensor:
        """[...,D] -> [...,O] in the dtype of the input, computed in the compute dtype."""
        x = input.to(self.compute_dtype)
        if self.is_recomputed and self.training:
            return F.linear(x, self.dequantize(self.weight.detach()), self.bias).to(input.dtype)
        output = _FrozenProduct.apply(x, self.weight, self.bias, self)
        return cast(Tensor, output).to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        return super()._apply(keeping_dtypes(fn), recurse)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}, storage={self.weight.dtype}"


class Linear4bit(QuantizedLinear):
    """NF4 or FP4 in blocks of 64 weights.

    Args:
        in_features, out_features, packed, bias, compute_dtype: as for the base.
        quant_state: bitsandbytes' scales and code book for `packed`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        *,
        quant_state: Any,
    ) -> None:
        super().__init__(in_features, out_features, packed, bias, compute_dtype)
        self.quant_state = quant_state

    def dequantize(self, packed: Tensor) -> Tensor:
        """The weight [O,D] in the compute dtype, from `packed` [n,1]."""
        state = self.quant_state
        if packed.is_cuda and state.nested:
            weight: Tensor = torch.ops.ssmlora.dequantize_4bit(
                state.state2.absmax,
                state.state2.code,
                state.offset,
                state.absmax,
                state.code,
                packed,
                state.quant_type,
                self.out_features,
                state.dtype,
            )
            return weight.to(self.compute_dtype)
        if self._mixes_up_scales(packed):
            state = copy.copy(state)
            state.shape = torch.Size((1, state.shape.numel()))
        weight = bitsandbytes().functional.dequantize_4bit(packed, state)
        return weight.view(self.out_features, self.in_features).to(self.compute_dtype)

    def multiply(self, x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, [...,D] -> [...,O]; on CUDA small inputs never meet the whole weight."""
        if self._mixes_up_scales(packed):
            return F.linear(x, self.dequantize(packed), bias)
        output: Tensor = bitsandbytes().matmul_4bit(x, packed, quant_state=self.quant_state, bias=bias)
        return output

    def _mixes_up_scales(self, packed: Tensor) -> bool:
        """Whether bitsandbytes 0.50.2 would: on a CPU, where a row ends within a block."""
        return self.in_features % BLOCK_SIZE != 0 and not packed.is_cuda

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        super()._apply(fn, recurse)
        self.quant_state.to(self.weight.device)
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, {self.quant_state.quant_type}"


class Linear8bit(QuantizedLinear):
    """int8 with one scale per output row: W = q * scale / 127.

    Args:
        in_features, out_features, packed, bias, compute_dtype: as for the base.
        scale: largest magnitude of each row [O], float32.
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        packed: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        *,
        scale: Tensor,
    ) -> None:
        super().__init__(in_features, out_features, packed, bias, compute_dtype)
        self.register_buffer("scale", scale, persistent=False)

    def dequantize(self, packed: Tensor) -> Tensor:
        """The weight [O,D] in the compute dtype, from `packed` [n,1]."""
        codes = packed.view(torch.int8).view(self.out_features, self.in_features)
        return codes.to(self.compute_dtype).mul_(self.scale.unsqueeze(1).mul(1.0 / INT8_MAX))


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + bias for a frozen W; saves the packed weight, by autograd's own means, and no more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(packed)
        return layer.multiply(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (packed,) = ctx.saved_tensors
        weight = ctx.layer.dequantize(packed)
        # Under autocast the product was in its dtype.
        return torch.matmul(gradients[0].to(weight.dtype), weight), None, None, None


def quantize_linear(
    linear: nn.Linear,
    *,
    mode: QuantizationMode,
    double_quantization: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    quant_storage: torch.dtype | None = None,
) -> QuantizedLinear:
    """A frozen copy of `linear` on the same device, its weight stored as `mode` says.

    The weight is rounded to `compute_dtype` first, as Hugging Face's loading does, so that both quantise the
    same numbers.

    Args:
        linear: the layer whose weight [O,D] and bias [O] are read; it is left as it was.
        mode: `nf4`, `fp4` or `int8`.
        double_quantization: in 4 bits, store the scales in 8 bits too (0.37 bits less per weight).
        compute_dtype: dtype of the products, and of the bias.
        quant_storage: dtype as which the packed bytes are stored; None takes the compute dtype, which is
            what ZeRO 3 needs to shard them beside the other parameters.

    Raises:
        ModelError: bitsandbytes is missing, or it cannot store a weight of this size.
    """
    weight = linear.weight.detach().to(compute_dtype)
    bias = None if linear.bias is None else linear.bias.detach().to(compute_dtype)
    assert compute_dtype in QUANTIZABLE_DTYPES, compute_dtype
    storage = compute_dtype if quant_storage is None else quant_storage
    bits = 8 if mode == "int8" else 4
    if weight.numel() * bits % (8 * storage.itemsize):
        raise ModelError(
            f"quantization.mode: a layer of {linear.out_features} x {linear.in_features} weights does not "
            f'fill whole elements of {storage} in {bits} bits; use mode "none" for a model of such odd sizes'
        )
    sizes = (linear.in_features, linear.out_features)
    functional = bitsandbytes().functional
    if mode == "int8":
        codes, scale, _ = functional.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
        packed = codes.view(-1).view(storage).unsqueeze(1)
        return Linear8bit(*sizes, packed, bias, compute_dtype, scale=scale).train(linear.training)
    packed, quant_state = quantize_4bit(weight.contiguous(), mode, double_quantization, storage)
    return Linear4bit(*sizes, packed, bias, compute_dtype, quant_state=quant_state).train(linear.training)


def keeping_dtypes(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `Module._apply`, which then moves tensors but does not cast them."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def quantize_4bit(
    weight: Tensor, mode: str, double_quantization: bool, storage: torch.dtype
) -> tuple[Tensor, Any]:
    """What bitsandbytes' `quantize_4bit` gives; on a CPU without its temporaries of five times the weight."""
    functional = bitsandbytes().functional
    settings = {"blocksize": BLOCK_SIZE, "quant_type": mode, "quant_storage": storage}
    if weight.device.type != "cpu" or weight.numel() <= CHUNK_SIZE:
        packed, state = functional.quantize_4bit(weight, compress_statistics=double_quantization, **settings)
        return packed, state
    pieces = [functional.quantize_4bit(chunk, **settings) for chunk in weight.view(-1).split(CHUNK_SIZE)]
    packed = torch.cat([piece for piece, _ in pieces])
    absmax = torch.cat([state.absmax for _, state in pieces])
    offset, state2 = None, None
    if double_quantization:
        # Over the scales of all chunks, as bitsandbytes does it.
        offset = absmax.mean()
        absmax, state2 = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    state = functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        code=pieces[0][1].code,
        blocksize=BLOCK_SIZE,
        quant_type=mode,
        dtype=weight.dtype,
        offset=offset,
        state2=state2,
    )
    return packed, state


def keep_weights_of_recompute(layer: nn.Module) -> None:
    """Spares a decoder layer under non-reentrant gradient checkpointing one of three dequantisations.

    In training its quantised layers then leave their dequantised weights to autograd. Checkpointing drops
    what the forward pass leaves; what the recompute leaves lives until the backward pass, which follows at
    once, has used it. So the weights of one decoder layer exist at a time. Without checkpointing all would.
    Those of experts, gigabytes in one layer, are not left even then.

    The recompute also ends before the layer's last product, of which nothing but the weight is needed.
    """
    for module in layer.modules():
        if isinstance(module, QuantizedLinear):
            module.is_recomputed = True


@contextmanager
def fresh_code_books() -> Iterator[None]:
    """Has bitsandbytes make its code books anew, which it keeps as tensors for the life of the process."""
    with mock.patch.dict(bitsandbytes().functional.name2qmap, clear=True):
        yield


@functools.cache
def bitsandbytes() -> Any:
    """The bitsandbytes module, imported at the first use.

    Raises:
        ModelError: it is not installed.
    """
    # On CPUs with avx512_bf16 the import warns that an optional inference kernel, unused here, is absent.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes as module
    except ImportError as error:
        raise ModelError(
            f"quantization.mode: 4 and 8 bits need bitsandbytes, which cannot be imported ({error}); install "
            'it, or set the mode to "none"'
        ) from error
    return module
