"""Dropout as a Triton kernel, and what other kernels share with it: imported only where Triton is installed.

`TRITON_INTERPRET=1` at import runs it on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmlora_dist.ops.dropout import FACTORS, SHIFTS, START, threshold

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DROPOUT_BLOCK = 1024

_START = tl.constexpr(START)
_SHIFT_0, _SHIFT_1, _SHIFT_2 = (tl.constexpr(shift) for shift in SHIFTS)
_FACTOR_0, _FACTOR_1 = (tl.constexpr(factor % 2**32) for factor in FACTORS)


def takes(tensor: Tensor) -> bool:
    """Whether there is a kernel for the dtype of what is dropped."""
    return tensor.dtype in DTYPES


@triton.jit
def _absorb(hash, value):
    hash = value.to(tl.uint32) ^ hash
    hash = (hash ^ (hash >> _SHIFT_0)) * _FACTOR_0
    hash = (hash ^ (hash >> _SHIFT_1)) * _FACTOR_1
    return hash ^ (hash >> _SHIFT_2)


@triton.jit
def is_kept(seeds_ptr, dropout_id, tokens, T, components, threshold):
    """`dropout.keep_mask` of tokens [BT], of T, and components [C], as [BT,C]."""
    seeds = tl.load(seeds_ptr + tokens, tokens < T, 0)
    hash = _absorb(_absorb(_START, dropout_id), seeds)
    hash = _absorb(hash[:, None], components[None, :])
    return hash.to(tl.int32, bitcast=True) >= threshold


@triton.jit(do_not_specialize=["dropout_id", "threshold"])
def _dropout_kernel(
    x_ptr, y_ptr, seeds_ptr, x_stride, dropout_id, threshold, keep_scale,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    components = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (components < C)[None, :]
    x = tl.load(x_ptr + token[:, None] * x_stride + components[None, :], inside, 0.0)
    T = tl.num_programs(0)
    kept = is_kept(seeds_ptr, dropout_id, token, T, components, threshold)
    y = tl.where(kept, x.to(tl.float32) * keep_scale, 0.0)
    tl.store(y_ptr + token[:, None] * C + components[None, :], y, inside)


def dropout(x_BSC: Tensor, seeds: Tensor, dropout_id: int, probability: float) -> Tensor:
    """See `dropout.dropout`."""
    x = rows(x_BSC)
    y = x_BSC.new_empty(x_BSC.shape)
    grid = (x.shape[0], triton.cdiv(x.shape[1], DROPOUT_BLOCK))
    args = rng_kernel_args(probability, dropout_id)
    _dropout_kernel[grid](x, y, seeds.contiguous(), x.stride(0), *args, C=x.shape[1], BLOCK=DROPOUT_BLOCK)
    return y


def rows(tensor_BSC: Tensor) -> Tensor:
    """[T,C], of which the last axis is contiguous."""
    rows = tensor_BSC.reshape(-1, tensor_BSC.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rng_kernel_args(probability: float, dropout_id: int) -> tuple[int, int, float]:
    """What kernels are told of dropout, behind the tensors."""
    return dropout_id, threshold(probability), 1 / (1 - probability)
