"""Experts of a mixture, all in one 3-D weight, stored in 4 or 8 bits.

transformers keeps the weights of a layer's experts as parameters [E,M,N] of one module, which bitsandbytes
leaves as they are. Here each expert is quantised by itself, as a linear layer is, and dequantised where a
product needs it. What experts compute is left to their own class, in any of its implementations: its forward
pass meets objects that stand for the weights and multiply with them.

Shapes: E experts, M and N the axes of one expert's weight, as stored; P packed bytes of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlora_dist.errors import ModelError
from ssmlora_dist.quantization.linear import (
    INT8_MAX,
    QUANTIZABLE_DTYPES,
    QuantizationMode,
    bitsandbytes,
    keeping_dtypes,
    quantize_4bit,
)
from ssmlora_dist.quantization.operators import BLOCK_SIZE, NESTED_BLOCK_SIZE

ALIGNMENT_BYTES = 32  # a block of 64 in 4 bits, and whole elements of any storage
MAX_WEIGHTS_AT_ONCE = 2**30  # bitsandbytes counts in 32 bits

# What transformers' interface of interchangeable implementations says of a module, and how it names weights.
INTERFACE_ATTRIBUTES = ("num_experts", "is_transposed", "has_bias", "has_gate")
INTERFACE_WEIGHTS = frozenset({"gate_up_proj", "up_proj", "down_proj"})

_SCALES = "{}_scales"  # buffers of a weight, by its name
_NESTED_SCALES = "{}_nested_scales"
_OFFSETS = "{}_scale_offsets"

ReadTensor = Callable[[str, torch.Size], Tensor]
"""The tensor of a module by its name in it and its shape, in the compute dtype."""


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """Names of the experts' weights [E,M,N] that `module` itself holds; they need no storage.

    Experts are floating parameters of three axes, but for kernels of convolutions and vectors that are
    spread over axes of one. Their layout is known where the module follows transformers' interface of
    interchangeable implementations.

    Raises:
        ModelError: there are such weights in a layout that is not known.
    """
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and parameter.is_floating_point()
    }
    if not shapes or isinstance(module, nn.modules.conv._ConvNd):
        return ()
    follows = all(hasattr(module, attribute) for attribute in INTERFACE_ATTRIBUTES)
    if not follows or any(
        name not in INTERFACE_WEIGHTS or shape[0] != module.num_experts for name, shape in shapes.items()
    ):
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ModelError(
            f"quantization.mode: {type(module).__name__} holds weights ({listed}) in a layout that is not "
            'known, so that they would stay dense; set the mode to "none", or name a model whose experts '
            "follow transformers' experts interface"
        )
    return tuple(shapes)


class QuantizedExperts(nn.Module):
    """In the place of a module of experts: computes what its class does, with quantised weights.

    Each weight is a frozen parameter [E,P] of its name, viewed as the storage dtype, so that a sharding
    engine that expects one floating dtype takes it; its values mean nothing as numbers. Moving the module
    moves it, and casting the module leaves every bit as it is. Differentiable in hidden states and routing
    weights.

    The dequantised weights are never left to autograd, not even in a recompute: those of one layer's experts
    take gigabytes.

    Args:
        experts: whose settings, activation and hooks are taken over; its parameters may have no storage.
        read: the tensors of its parameters, each asked for once.
        mode: `nf4`, `fp4` or `int8`.
        double_quantization: in 4 bits, store the scales in 8 bits too.
        compute_dtype: of the products, and of whatever is not quantised, as biases.
        quant_storage: dtype as which the packed bytes are stored.

    Attributes:
        experts_class: the class that was replaced, which computes.
        shapes: of the weights [E,M,N], by name.
    """

    nested_code: Tensor

    def __init__(
        self,
        experts: nn.Module,
        read: ReadTensor,
        *,
        mode: QuantizationMode,
        double_quantization: bool,
        compute_dtype: torch.dtype,
        quant_storage: torch.dtype,
    ) -> None:
        super().__init__()
        assert compute_dtype in QUANTIZABLE_DTYPES, compute_dtype
        names = expert_weights(experts)
        taken = {"_modules": dict(experts._modules), "_buffers": dict(experts._buffers)}
        taken |= {name: value for name, value in vars(experts).items() if name not in vars(self)}
        vars(self).update(taken)
        self.experts_class = type(experts)
        self.mode, self.double_quantization = mode, double_quantization and mode != "int8"
        self.compute_dtype = compute_dtype
        self.shapes: dict[str, torch.Size] = {}
        for name, parameter in experts.named_parameters(recurse=False):
            tensor = read(name, parameter.shape).to(compute_dtype)
            if name in names:
                self.shapes[name] = parameter.shape
                tensor = self._pack(name, tensor).view(quant_storage)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        if self.double_quantization:
            code = bitsandbytes().functional.create_dynamic_map()
            self.register_buffer("nested_code", code.to(tensor.device), persistent=False)
        self.train(experts.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the experts' own class computes."""
        stand_in = object.__new__(self.experts_class)
        weights = {name: ExpertWeights(self, name, getattr(self, name)) for name in self.shapes}
        # Found before the parameters of the same names, and by this call alone.
        vars(stand_in).update(vars(self) | weights)
        return self.experts_class.forward(stand_in, *args, **kwargs)

    def dequantize(self, name: str, packed: Tensor, expert: int | None = None) -> Tensor:
        """The weight `name` [E,M,N], or one expert's [M,N], in the compute dtype, from `packed` [E,P]."""
        shape = self.shapes[name]
        num_weights = shape[1:].numel()
        first, stop = (0, shape[0]) if expert is None else (expert, expert + 1)
        step = max(1, MAX_WEIGHTS_AT_ONCE // num_weights)
        codes = packed.view(torch.uint8)
        unpack = self._unpack_8bit if self.mode == "int8" else self._unpack_4bit
        pieces = [
            unpack(name, codes, slice(begin, min(begin + step, stop))) for begin in range(first, stop, step)
        ]
        weights = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return weights if expert is None else weights[0]

    def _pack(self, name: str, weights: Tensor) -> Tensor:
        """The packed bytes [E,P] of the weight [E,M,N]; registers the scales."""
        packed: Tensor | None = None
        statistics: list[dict[str, Tensor]] = []
        for index, weight in enumerate(weights):
            pack = self._pack_8bit if self.mode == "int8" else self._pack_4bit
            codes, scales = pack(weight)
            if packed is None:
                packed = codes.new_empty(weights.shape[0], _filled(codes.numel(), ALIGNMENT_BYTES))
            packed[index] = _fill(codes, ALIGNMENT_BYTES)
            statistics.append(scales)
        assert packed is not None
        for kind in statistics[0]:
            values = torch.stack([scales[kind] for scales in statistics])
            self.register_buffer(kind.format(name), values, persistent=False)
        return packed

    def _pack_4bit(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        flat = _fill(weight.reshape(-1), BLOCK_SIZE)
        codes, state = quantize_4bit(flat, self.mode, self.double_quantization, torch.uint8)
        if not self.double_quantization:
            return codes.view(-1), {_SCALES: state.absmax}
        return codes.view(-1), {
            _SCALES: _fill(state.absmax, NESTED_BLOCK_SIZE),
            _NESTED_SCALES: state.state2.absmax,
            _OFFSETS: state.offset,
        }

    def _unpack_4bit(self, name: str, codes: Tensor, experts: slice) -> Tensor:
        functional = bitsandbytes().functional
        shape = self.shapes[name]
        scales = self._buffer(_SCALES, name)[experts]
        chosen = codes[experts]
        num_weights, num_stored = shape[1:].numel(), 2 * chosen.shape[1]
        if self.double_quantization:
            nested = self._buffer(_NESTED_SCALES, name)[experts].reshape(-1)
            scales = functional.dequantize_blockwise(
                scales, absmax=nested, code=self.nested_code, blocksize=NESTED_BLOCK_SIZE
            )
            scales += self._buffer(_OFFSETS, name)[experts].unsqueeze(1)
        state = functional.QuantState(
            absmax=scales[:, : num_stored // BLOCK_SIZE].reshape(-1),
            shape=(len(chosen), num_stored),
            blocksize=BLOCK_SIZE,
            quant_type=self.mode,
            dtype=self.compute_dtype,
        )
        weights = functional.dequantize_4bit(chosen.reshape(-1, 1), state)
        return cast(Tensor, weights)[:, :num_weights].reshape(len(chosen), *shape[1:])

    def _pack_8bit(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        codes, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.to(torch.float16))
        return codes.view(-1).view(torch.uint8), {_SCALES: scales}

    def _unpack_8bit(self, name: str, codes: Tensor, experts: slice) -> Tensor:
        shape = self.shapes[name]
        numbers = codes[experts].view(torch.int8)[:, : shape[1:].numel()].unflatten(1, shape[1:])
        scales = self._buffer(_SCALES, name)[experts].unsqueeze(-1)
        return numbers.to(self.compute_dtype).mul_(scales.mul(1.0 / INT8_MAX))

    def _buffer(self, kind: str, name: str) -> Tensor:
        return cast(Tensor, getattr(self, kind.format(name)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        return super()._apply(keeping_dtypes(fn), recurse)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        shapes = ", ".join(f"{name}={list(shape)}" for name, shape in self.shapes.items())
        return f"{shapes}, compute_dtype={self.compute_dtype}, {self.mode}"


def quantize_experts(
    experts: nn.Module,
    read: ReadTensor | None = None,
    *,
    mode: QuantizationMode,
    double_quantization: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    quant_storage: torch.dtype | None = None,
) -> QuantizedExperts:
    """A frozen copy of a module of experts, each expert's weights stored as `mode` says.

    Args:
        experts: one for which `expert_weights` names some; it is left as it was.
        read: gives its tensors, one at a time, so that its parameters need no storage; None takes these.
        mode: `nf4`, `fp4` or `int8`.
        double_quantization: in 4 bits, store the scales in 8 bits too.
        compute_dtype: dtype of the products, and of whatever is not quantised.
        quant_storage: dtype as which the packed bytes are stored; None takes the compute dtype, which is
            what ZeRO 3 needs to shard them beside the other parameters.

    Raises:
        ModelError: the experts' layout is not known, or bitsandbytes is missing.
    """
    return QuantizedExperts(
        experts,
        read or (lambda name, _: getattr(experts, name).detach()),
        mode=mode,
        double_quantization=double_quantization,
        compute_dtype=compute_dtype,
        quant_storage=compute_dtype if quant_storage is None else quant_storage,
    )


class ExpertWeights:
    """Stands for a weight [E,M,N], or one expert's [M,N], in the forward pass of the experts' class.

    Products with it dequantise it and save for the backward pass what is packed. One expert is had by its
    index; those at several indices are dequantised at once, as a tensor.

    Args:
        owner: holds the scales.
        name: of the weight.
        packed: its parameter.
        expert: whose weight it is; None: that of all.
        transposed: whether its last two axes change places.
    """

    def __init__(
        self,
        owner: QuantizedExperts,
        name: str,
        packed: Tensor,
        expert: int | None = None,
        transposed: bool = False,
    ) -> None:
        self.owner, self.name, self.packed = owner, name, packed
        self.expert, self.transposed = expert, transposed

    @property
    def dtype(self) -> torch.dtype:
        """Of the dequantised weight."""
        return self.owner.compute_dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.packed.device

    def transpose(self, first: int, second: int) -> ExpertWeights:
        """With the last two axes in each other's place."""
        assert {first, second} == {-2, -1}, "the experts' axis stays in front"
        return ExpertWeights(self.owner, self.name, self.packed, self.expert, not self.transposed)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, Tensor) or index.dim() == 0:
            return ExpertWeights(self.owner, self.name, self.packed, int(index), self.transposed)
        hit, inverse = index.unique(return_inverse=True)
        return torch.stack([self[expert].tensor() for expert in hit.tolist()])[inverse]

    def tensor(self, packed: Tensor | None = None) -> Tensor:
        """The dequantised weight."""
        packed = self.packed if packed is None else packed
        weight = self.owner.dequantize(self.name, packed.detach(), self.expert)
        return weight.transpose(-2, -1) if self.transposed else weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        x, weights, *rest = (*args, None)
        offsets = (kwargs or {}).get("offs")
        if not isinstance(weights, cls) or not (func in (F.linear, Tensor.matmul) or offsets is not None):
            raise ModelError(
                f"quantization.mode: the experts' implementation applies {func.__name__} to their weights, "
                "which must be dense for that; choose another by `model.set_experts_implementation`, or set "
                'the mode to "none"'
            )
        if func is F.linear:
            weights = weights.transpose(-2, -1)
        return _ExpertsProduct.apply(x, weights.packed, rest[0], offsets, weights, func)


class _ExpertsProduct(torch.autograd.Function):
    """x W + bias for frozen W; saves the packed weights, by autograd's own means, and no more.

    `offsets` [E] are where the rows of x end that belong to each expert; None: there is one expert.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        offsets: Tensor | None,
        weights: ExpertWeights,
        product: Callable[..., Tensor],
    ) -> Tensor:
        ctx.weights, ctx.product = weights, product
        ctx.save_for_backward(packed, offsets)
        weight = weights.tensor(packed)
        if offsets is not None:
            return product(x, weight, offs=offsets)
        if product is F.linear:
            return F.linear(x, weight.transpose(-2, -1), bias)
        return torch.matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        packed, offsets = ctx.saved_tensors
        weight = ctx.weights.tensor(packed).transpose(-2, -1)
        if offsets is None:
            gradient = torch.matmul(gradients[0], weight)
        else:
            # Grouped kernels want rows that lie one behind the other.
            gradient = ctx.product(gradients[0].contiguous(), weight, offs=offsets)
        return gradient, *(None,) * 5


def _filled(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _fill(values: Tensor, multiple: int) -> Tensor:
    """`values` [n], with zeros up to a multiple of a length."""
    return F.pad(values, (0, _filled(values.numel(), multiple) - values.numel()))
