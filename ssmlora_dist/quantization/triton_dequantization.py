"""Dequantisation as a Triton kernel: imported only where Triton is installed.

A program takes BLOCKS blocks of weights: their scales, worked out once, and their packed bytes. Products and
sums are rounded one by one, as by bitsandbytes, so the bits are the same.

`TRITON_INTERPRET=1` at import runs it on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmlora_dist.quantization.operators import BLOCK_SIZE, NESTED_BLOCK_SIZE

BLOCKS = 32


def takes(nested_scales: Tensor) -> bool:
    """Whether scales are stored as the kernel reads them."""
    return nested_scales.dtype == torch.float32


@triton.jit
def _dequantize_kernel(
    nested_scales_ptr, nested_code_ptr, offset_ptr, scales_ptr, code_ptr, packed_ptr, weight_ptr, num_bytes,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = BLOCK // 2
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    # The last block may be a part of one.
    is_block = blocks * BYTES < num_bytes
    scale_codes = tl.load(scales_ptr + blocks, is_block, 0).to(tl.int32)
    nested = tl.load(nested_scales_ptr + blocks // NESTED, is_block, 0.0)
    scales = tl.load(nested_code_ptr + scale_codes) * nested + tl.load(offset_ptr)
    at_bytes = blocks[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed = tl.load(packed_ptr + at_bytes, at_bytes < num_bytes, 0).to(tl.int32)
    first = tl.load(code_ptr + (packed >> 4)) * scales[:, None]
    second = tl.load(code_ptr + (packed & 15)) * scales[:, None]
    at_weights = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(weight_ptr + at_weights, tl.interleave(first, second), at_weights < 2 * num_bytes)


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
    """See `operators.dequantize_4bit`."""
    read = packed.contiguous().view(-1).view(torch.uint8)
    weight = packed.new_empty((num_rows, 2 * read.numel() // num_rows), dtype=dtype)
    grid = (triton.cdiv(read.numel(), BLOCKS * BLOCK_SIZE // 2),)
    _dequantize_kernel[grid](
        nested_scales, nested_code, offset, scales, code, read, weight, read.numel(),
        BLOCK=BLOCK_SIZE, NESTED=NESTED_BLOCK_SIZE, BLOCKS=BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
    return weight
