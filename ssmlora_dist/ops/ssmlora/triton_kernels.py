"""The state step and its gradient as Triton kernels: imported only where Triton is installed.

A program takes blocks of BT tokens with all R components of the state, padded to RP = a power of two >= 16.
Matrices pass through in pieces of BK rows, so that a rank of 128 fits. In the backward pass the programs form
a grid (blocks of tokens) x (pieces of BK components): each works out dh whole, and its piece of everything
else. Sums over tokens for the two R x R gradients go into a buffer, program by program, and are then added up
in order: no atomics, hence the same bits in every run.

`TRITON_INTERPRET=1` at import runs all of it on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmlora_dist.ops.ssmlora.reference import EPSILON, MIN_SPREAD
from ssmlora_dist.ops.triton_dropout import DTYPES, is_kept, rng_kernel_args, rows

# Beyond it the backward pass spills registers, and plain products, which are cuBLAS's, are large enough.
MAX_RANK = 128
# Of the backward pass: about two for each multiprocessor; more blocks than that are taken in turn.
MAX_PROGRAMS = 256
_NORMALIZATIONS = {"minmax": 0, "rms": 1, "none": 2}

_EPSILON, _MIN_SPREAD = tl.constexpr(EPSILON), tl.constexpr(MIN_SPREAD)
_MIN_SQUARE = tl.constexpr(MIN_SPREAD**2)


def takes(tensor: Tensor) -> bool:
    """Whether there are kernels for the dtype and the rank of an operator's first tensor."""
    return tensor.dtype in DTYPES and tensor.shape[-1] <= MAX_RANK


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _h(
    z_ptr,
    g_ptr,
    c_ptr,
    d_ptr,
    tokens,
    T,
    z_stride,
    g_stride,
    R: tl.constexpr,
    RP: tl.constexpr,
    BK: tl.constexpr,
):
    """h [BT,RP] of a block of tokens, 0 outside."""
    columns = tl.arange(0, RP)
    is_token = (tokens < T)[:, None]
    inside = is_token & (columns < R)[None, :]
    h = tl.load(g_ptr + tokens[:, None] * g_stride + columns[None, :], inside, 0.0).to(tl.float32)
    for start in range(0, RP, BK):
        k = start + tl.arange(0, BK)
        in_tokens = is_token & (k < R)[None, :]
        in_matrix = (k < R)[:, None] & (columns < R)[None, :]
        g = tl.load(g_ptr + tokens[:, None] * g_stride + k[None, :], in_tokens, 0.0).to(tl.float32)
        c = tl.load(c_ptr + k[:, None] * R + columns[None, :], in_matrix, 0.0)
        h += _product(g, c)
        z = tl.load(z_ptr + tokens[:, None] * z_stride + k[None, :], in_tokens, 0.0).to(tl.float32)
        d = tl.load(d_ptr + k[:, None] * R + columns[None, :], in_matrix, 0.0)
        h += _product(z, d)
    return h


@triton.jit
def _normalized(h, R: tl.constexpr, RP: tl.constexpr, NORMALIZATION: tl.constexpr):
    """n [BT,RP], 0 outside, and what its rows were divided by [BT], infinity for one without information."""
    inside = (tl.arange(0, RP) < R)[None, :]
    infinity = float("inf")
    if NORMALIZATION == 0:
        low = tl.min(tl.where(inside, h, infinity), axis=1)
        spread = tl.max(tl.where(inside, h, -infinity), axis=1) - low
        divisor = tl.where(spread >= _MIN_SPREAD, spread + _EPSILON, infinity)
        n = tl.where(inside, h - low[:, None], 0.0) / divisor[:, None]
    elif NORMALIZATION == 1:
        mean_square = tl.sum(h * h, axis=1) / R
        divisor = tl.sqrt(tl.where(mean_square >= _MIN_SQUARE, mean_square, infinity))
        n = h / divisor[:, None]
    else:
        divisor = tl.full((h.shape[0],), 1.0, tl.float32)
        n = h
    return n, divisor


@triton.jit
def _normalized_backward(h, n, divisor, d_n, R: tl.constexpr, RP: tl.constexpr, NORMALIZATION: tl.constexpr):
    """dh [BT,RP] from dn."""
    columns = tl.arange(0, RP)[None, :]
    if NORMALIZATION == 0:
        low = tl.min(tl.where(columns < R, h, float("inf")), axis=1)
        high = tl.max(tl.where(columns < R, h, -float("inf")), axis=1)
        # The first of several least or largest components.
        first_low = tl.min(tl.where((h == low[:, None]) & (columns < R), columns, RP), axis=1)
        first_high = tl.min(tl.where((h == high[:, None]) & (columns < R), columns, RP), axis=1)
        s0 = tl.sum(d_n, axis=1)
        s1 = tl.sum(d_n * n, axis=1)
        d_n += tl.where(columns == first_low[:, None], (s1 - s0)[:, None], 0.0)
        d_n -= tl.where(columns == first_high[:, None], s1[:, None], 0.0)
    elif NORMALIZATION == 1:
        d_n -= n * (tl.sum(d_n * n, axis=1) / R)[:, None]
    return d_n / divisor[:, None]


@triton.jit(do_not_specialize=["dropout_id", "T", "threshold"])
def _forward_kernel(
    z_ptr, g_ptr, c_ptr, d_ptr, seeds_ptr, u_ptr, carried_ptr,
    T, z_stride, g_stride, dropout_id, threshold, keep_scale, scaling,
    R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    NORMALIZATION: tl.constexpr, RAW: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    tokens = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    columns = tl.arange(0, RP)
    inside = (tokens < T)[:, None] & (columns < R)[None, :]
    h = _h(z_ptr, g_ptr, c_ptr, d_ptr, tokens, T, z_stride, g_stride, R, RP, BK)
    n, _ = _normalized(h, R, RP, NORMALIZATION)
    carried = h if RAW else n
    if DROPOUT:
        kept_BR = is_kept(seeds_ptr, dropout_id, tokens, T, columns, threshold)
        n = tl.where(kept_BR, n * keep_scale, 0.0)
    z = tl.load(z_ptr + tokens[:, None] * z_stride + columns[None, :], inside, 0.0).to(tl.float32)
    offsets = tokens[:, None] * R + columns[None, :]
    tl.store(u_ptr + offsets, (z + n) * scaling, inside)
    tl.store(carried_ptr + offsets, carried, inside)


@triton.jit(do_not_specialize=["dropout_id", "T", "threshold"])
def _backward_kernel(
    d_u_ptr, d_carried_ptr, z_ptr, g_ptr, c_ptr, d_ptr, seeds_ptr,
    u_ptr, d_z_ptr, d_g_ptr, sums_ptr,
    T, d_u_stride, d_carried_stride, z_stride, g_stride,
    dropout_id, threshold, keep_scale, scaling,
    R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, NORMALIZATION: tl.constexpr,
    RAW: tl.constexpr, DROPOUT: tl.constexpr, CARRIED: tl.constexpr, NEEDS_D_G: tl.constexpr,
):  # fmt: skip
    program, piece = tl.program_id(0), tl.program_id(1)
    columns = tl.arange(0, RP)
    k = piece * BK + tl.arange(0, BK)
    in_matrix = (k < R)[:, None] & (columns < R)[None, :]
    matrix_places = k[:, None] * R + columns[None, :]
    c = tl.load(c_ptr + matrix_places, in_matrix, 0.0)
    d = tl.load(d_ptr + matrix_places, in_matrix, 0.0)
    # dg = dh + dh W_c^T: one product.
    c += tl.where(in_matrix & (k[:, None] == columns[None, :]), 1.0, 0.0)
    sum_c = tl.zeros((BK, RP), tl.float32)
    sum_d = tl.zeros((BK, RP), tl.float32)
    start = program * BT
    while start < T:
        tokens = (start + tl.arange(0, BT)).to(tl.int64)
        start += tl.num_programs(0) * BT
        is_token = (tokens < T)[:, None]
        inside = is_token & (columns < R)[None, :]
        in_piece = is_token & (k < R)[None, :]
        offsets = tokens[:, None] * R + k[None, :]
        h = _h(z_ptr, g_ptr, c_ptr, d_ptr, tokens, T, z_stride, g_stride, R, RP, BK)
        n, divisor = _normalized(h, R, RP, NORMALIZATION)
        d_u = tl.load(d_u_ptr + tokens[:, None] * d_u_stride + columns[None, :], inside, 0.0).to(tl.float32)
        d_n = d_u * scaling
        kept = n
        if DROPOUT:
            kept_BR = is_kept(seeds_ptr, dropout_id, tokens, T, columns, threshold)
            d_n = tl.where(kept_BR, d_n * keep_scale, 0.0)
            kept = tl.where(kept_BR, n * keep_scale, 0.0)
        if CARRIED:
            at_carried = d_carried_ptr + tokens[:, None] * d_carried_stride + columns[None, :]
            d_carried = tl.load(at_carried, inside, 0.0).to(tl.float32)
        if CARRIED and not RAW:
            d_n += d_carried
        d_h = _normalized_backward(h, n, divisor, d_n, R, RP, NORMALIZATION)
        if CARRIED and RAW:
            d_h += d_carried
        z = tl.load(z_ptr + tokens[:, None] * z_stride + columns[None, :], inside, 0.0).to(tl.float32)
        if piece == 0:
            tl.store(u_ptr + tokens[:, None] * R + columns[None, :], (z + kept) * scaling, inside)
        # The piece of everything that is summed over components.
        d_u_piece = tl.load(d_u_ptr + tokens[:, None] * d_u_stride + k[None, :], in_piece, 0.0).to(tl.float32)
        d_z = d_u_piece * scaling + _product(d_h, tl.trans(d))
        tl.store(d_z_ptr + offsets, d_z, in_piece)
        if NEEDS_D_G:
            d_g = _product(d_h, tl.trans(c))
            tl.store(d_g_ptr + offsets, d_g, in_piece)
        g_piece = tl.load(g_ptr + tokens[:, None] * g_stride + k[None, :], in_piece, 0.0).to(tl.float32)
        z_piece = tl.load(z_ptr + tokens[:, None] * z_stride + k[None, :], in_piece, 0.0).to(tl.float32)
        sum_c += _product(tl.trans(g_piece), d_h)
        sum_d += _product(tl.trans(z_piece), d_h)
    at_sums = sums_ptr + program.to(tl.int64) * 2 * R * R + matrix_places
    tl.store(at_sums, sum_c, in_matrix)
    tl.store(at_sums + R * R, sum_d, in_matrix)


def state_forward(
    z_BSR: Tensor,
    h_prev_BSR: Tensor,
    transition_RR: Tensor,
    input_RR: Tensor,
    seeds: Tensor | None,
    scaling: float,
    normalization: str,
    carry: str,
    dropout: float,
    dropout_id: int,
) -> tuple[Tensor, Tensor]:
    """See `state_step.state_forward`."""
    z, g = rows(z_BSR), rows(h_prev_BSR)
    u, carried = z_BSR.new_empty(z_BSR.shape), h_prev_BSR.new_empty(z_BSR.shape)
    sizes = _sizes(z.shape[1])
    drawn = seeds.contiguous() if seeds is not None and dropout else None
    grid = (triton.cdiv(z.shape[0], sizes["BT"]),)
    _forward_kernel[grid](
        z, g, _matrix(transition_RR), _matrix(input_RR), drawn, u, carried,
        z.shape[0], z.stride(0), g.stride(0),
        *rng_kernel_args(dropout, dropout_id), scaling,
        **sizes, NORMALIZATION=_NORMALIZATIONS[normalization], RAW=carry == "raw", DROPOUT=drawn is not None,
    )  # fmt: skip
    return u, carried


def state_backward(
    d_u_BSR: Tensor,
    d_carried_BSR: Tensor | None,
    needs_d_h_prev: bool,
    z_BSR: Tensor,
    h_prev_BSR: Tensor,
    transition_RR: Tensor,
    input_RR: Tensor,
    seeds: Tensor | None,
    scaling: float,
    normalization: str,
    carry: str,
    dropout: float,
    dropout_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `state_step.state_backward`."""
    z, g, d_u = rows(z_BSR), rows(h_prev_BSR), rows(d_u_BSR)
    d_carried = None if d_carried_BSR is None else rows(d_carried_BSR)
    num_tokens, rank = z.shape
    u, d_z = z_BSR.new_empty(z_BSR.shape), z_BSR.new_empty(z_BSR.shape)
    d_h_prev = h_prev_BSR.new_empty(z_BSR.shape if needs_d_h_prev else 0)
    sizes = _sizes(rank)
    num_pieces = sizes["RP"] // sizes["BK"]
    num_programs = min(triton.cdiv(num_tokens, sizes["BT"]), MAX_PROGRAMS // num_pieces)
    sums = z.new_empty((num_programs, 2, rank, rank), dtype=torch.float32)
    drawn = seeds.contiguous() if seeds is not None and dropout else None
    _backward_kernel[(num_programs, num_pieces)](
        d_u, d_carried, z, g, _matrix(transition_RR), _matrix(input_RR), drawn, u, d_z, d_h_prev, sums,
        num_tokens, d_u.stride(0), 0 if d_carried is None else d_carried.stride(0), z.stride(0), g.stride(0),
        *rng_kernel_args(dropout, dropout_id), scaling,
        **sizes, NORMALIZATION=_NORMALIZATIONS[normalization], RAW=carry == "raw", DROPOUT=drawn is not None,
        CARRIED=d_carried is not None, NEEDS_D_G=needs_d_h_prev,
    )  # fmt: skip
    d_transition, d_input = sums.sum(0).unbind()
    return u, d_z, d_h_prev, d_transition.to(transition_RR.dtype), d_input.to(input_RR.dtype)


def _matrix(matrix_RR: Tensor) -> Tensor:
    return matrix_RR.detach().float().contiguous()


def _sizes(rank: int) -> dict[str, int]:
    """Blocks that stay in registers, on sm_80, sm_90 and sm_100: a thread spills two at most."""
    padded = max(16, triton.next_power_of_2(rank))
    return {
        "R": rank,
        "RP": padded,
        "BT": 32 if padded == 16 else 16,
        "BK": 16,
        "num_warps": 4 if padded <= 64 else 8,
        "num_stages": 1,
    }
