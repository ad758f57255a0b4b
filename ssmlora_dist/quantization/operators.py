"""`torch.ops.ssmlora.dequantize_4bit`: weights in 4 bits whose scales are stored in 8, at once.

bitsandbytes takes three launches for it; where Triton is there, it is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmlora_dist.ops.operators import register_operator

BLOCK_SIZE = 64  # weights per scale in 4 bits: QLoRA's choice and bitsandbytes' default
NESTED_BLOCK_SIZE = 256  # scales per scale of theirs: bitsandbytes' own


def dequantize_4bit(
    nested_scales: Tensor,
    nested_code: Tensor,
    offset: Tensor,
    scales: Tensor,
    code: Tensor,
    packed: Tensor,
    kind: str,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [O,D] by bitsandbytes' operators, with its bits.

    Args:
        nested_scales: float32, one for `NESTED_BLOCK_SIZE` scales.
        nested_code: float32 [256], what a byte of `scales` means.
        offset: float32 [], added to every scale.
        scales: uint8, one for `BLOCK_SIZE` weights.
        code: float32 [16], what four bits of `packed` mean.
        packed: two weights a byte, the first in the upper bits; of any dtype.
        kind: `nf4` or `fp4`.
        num_rows: O.
        dtype: of the result.
    """
    operators = torch.ops.bitsandbytes
    absmax = operators.dequantize_blockwise(
        scales, nested_scales, nested_code, NESTED_BLOCK_SIZE, torch.float32
    )
    absmax += offset
    shape = [num_rows, 2 * packed.numel() * packed.itemsize // num_rows]
    return operators.dequantize_4bit(packed, absmax, BLOCK_SIZE, kind, shape, dtype)  # type: ignore[no-any-return]


def _fake_dequantize(
    nested_scales: Tensor,
    nested_code: Tensor,
    offset: Tensor,
    scales: Tensor,
    code: Tensor,
    packed: Tensor,
    kind: str,
    num_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((num_rows, 2 * packed.numel() * packed.itemsize // num_rows), dtype=dtype)


register_operator(
    dequantize_4bit,
    "(Tensor nested_scales, Tensor nested_code, Tensor offset, Tensor scales, Tensor code, Tensor packed, "
    "str kind, int num_rows, ScalarType dtype) -> Tensor",
    _fake_dequantize,
    "ssmlora_dist.quantization.triton_dequantization",
)
