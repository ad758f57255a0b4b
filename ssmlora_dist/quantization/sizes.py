"""How many bytes weights take once they are quantised, counted without quantising them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ssmlora_dist.quantization.experts import ALIGNMENT_BYTES, expert_weights
from ssmlora_dist.quantization.linear import QuantizationMode
from ssmlora_dist.quantization.operators import BLOCK_SIZE, NESTED_BLOCK_SIZE

FLOAT32_BYTES = 4


def stored_bytes(
    part: nn.Module,
    *,
    mode: QuantizationMode | Literal["none"],
    double_quantization: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of the parameters of `part` whose linear layers and experts are stored as `mode` says.

    Scales count, buffers of its own and the code books, 1 kB for a weight at most, do not.

    Args:
        part: dense; it needs no storage.
        mode: `nf4`, `fp4`, `int8`, or `none` where nothing of it is quantised.
        double_quantization: in 4 bits, the scales are stored in 8 bits too.
        compute_dtype: of whatever is not quantised.

    Raises:
        ModelError: it holds experts in a layout that is not known.
    """
    total = 0
    for module in part.modules():
        experts = expert_weights(module) if mode != "none" else ()
        for name, parameter in module.named_parameters(recurse=False):
            is_linear = isinstance(module, nn.Linear) and name == "weight"
            if mode == "none" or not (is_linear or name in experts):
                total += parameter.numel() * compute_dtype.itemsize
                continue
            count, shape = (1, parameter.shape) if is_linear else (parameter.shape[0], parameter.shape[1:])
            codes = shape.numel() if mode == "int8" else (shape.numel() + 1) // 2
            blocks = shape[0] if mode == "int8" else -(-shape.numel() // BLOCK_SIZE)
            scales = blocks * FLOAT32_BYTES
            if mode != "int8" and double_quantization:
                nested = -(-blocks // NESTED_BLOCK_SIZE)
                # The offset of the scales is one number.
                scales = (nested + 1) * FLOAT32_BYTES + (blocks if is_linear else nested * NESTED_BLOCK_SIZE)
            if not is_linear:
                codes = -(-codes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            total += count * (codes + scales)
    return total
