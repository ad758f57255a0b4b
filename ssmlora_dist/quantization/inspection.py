"""How layers store their weights, and what they multiply with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmlora_dist.quantization.experts import QuantizedExperts
from ssmlora_dist.quantization.linear import Linear8bit, QuantizedLinear


def is_quantized(layer: nn.Module) -> bool:
    """Whether `layer`, linear or of experts, stores its weights in 4 or 8 bits."""
    return isinstance(layer, QuantizedLinear | QuantizedExperts)


def stored_as(layer: nn.Module) -> dict[str, Any]:
    """How a layer stores its weights: `quantization` and what it needs.

    Args:
        layer: linear, ours or bitsandbytes' own, or of experts.
    """
    if isinstance(layer, QuantizedExperts):
        if layer.mode == "int8":
            return {"quantization": "int8"}
        return {"quantization": layer.mode, "double_quantization": layer.double_quantization}
    weight = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is not None:
        return {"quantization": state.quant_type, "double_quantization": state.nested}
    in_8_bits = isinstance(layer, Linear8bit) or (weight is not None and weight.dtype == torch.int8)
    return {"quantization": "int8" if in_8_bits else "none"}


def dequantized_weight(layer: nn.Module, name: str = "weight") -> Tensor:
    """The weight that `layer` multiplies with: a new tensor if it is quantised, else its own.

    Args:
        layer: linear, of weight [O,D], or of experts.
        name: of the weight, which of experts are several: `gate_up_proj`.
    """
    weight: Tensor = getattr(layer, name).detach()
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(weight)
    if isinstance(layer, QuantizedExperts):
        return layer.dequantize(name, weight)
    return weight
