"""The state step of a time module and its gradient, by hand and in few passes, on any device.

Equations: README.md. The gradient is worked out anew from what the forward pass was given.

Shapes: B batch, S tokens, R rank, T = B S. State arithmetic is float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmlora_dist.ops.dropout import keep_mask
from ssmlora_dist.ops.form import state_dtype
from ssmlora_dist.ops.ssmlora.reference import EPSILON, MIN_SPREAD


class Recurrence(NamedTuple):
    """What a time module's state step is made of besides tensors.

    Attributes:
        scaling: of the adapter's output.
        normalization: `minmax`, `rms` or `none`.
        carry: what is handed on: `normalized` (n) or `raw` (h).
        dropout: probability, on the normalised state; drawn where seeds are given.
        dropout_id: which adapter of the model draws.
    """

    scaling: float
    normalization: str = "minmax"
    carry: str = "normalized"
    dropout: float = 0.0
    dropout_id: int = 0


def state_forward(
    z_BSR: Tensor,
    h_prev_BSR: Tensor,
    transition_RR: Tensor,
    input_RR: Tensor,
    seeds: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """scaling (z + K n) [B,S,R] in the dtype of z, and the carried state [B,S,R] in that of `h_prev`."""
    recurrence = Recurrence(*settings)
    _, z_TR, h_TR = _state(z_BSR, h_prev_BSR, transition_RR, input_RR)
    n_TR = _normalized(h_TR, recurrence.normalization)
    mask_TR = _dropout_factors(z_BSR, h_TR.dtype, seeds, recurrence)
    u_TR = n_TR + z_TR if mask_TR is None else torch.addcmul(z_TR, n_TR, mask_TR)
    carried_TR = n_TR if recurrence.carry == "normalized" else h_TR
    return (
        u_TR.mul_(recurrence.scaling).to(z_BSR.dtype).view(z_BSR.shape),
        carried_TR.to(h_prev_BSR.dtype).view(z_BSR.shape),
    )


def state_backward(
    d_u_BSR: Tensor,
    d_carried_BSR: Tensor | None,
    needs_d_h_prev: bool,
    z_BSR: Tensor,
    h_prev_BSR: Tensor,
    transition_RR: Tensor,
    input_RR: Tensor,
    seeds: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scaling u again, and the gradients of z, h_prev, W_c and W_d, each like what it is the gradient of.

    `d_u_BSR` is the gradient of `state_forward`'s first result and `d_carried_BSR` of its second, or None if
    nothing depends on it; without `needs_d_h_prev` that gradient comes back empty. The rest is as there.
    """
    recurrence = Recurrence(*settings)
    g_TR, z_TR, h_TR = _state(z_BSR, h_prev_BSR, transition_RR, input_RR)
    d_carried_TR = None if d_carried_BSR is None else _rows(d_carried_BSR, h_TR.dtype)
    mask_TR = _dropout_factors(z_BSR, h_TR.dtype, seeds, recurrence)
    d_z_TR = _rows(d_u_BSR, h_TR.dtype) * recurrence.scaling
    d_n_TR = d_z_TR if mask_TR is None else d_z_TR * mask_TR
    if d_carried_TR is not None and recurrence.carry == "normalized":
        d_n_TR = d_n_TR + d_carried_TR
    n_TR, d_h_TR = _normalized_backward(h_TR, d_n_TR, recurrence.normalization)
    if d_carried_TR is not None and recurrence.carry == "raw":
        d_h_TR = d_h_TR + d_carried_TR
    d_transition_RR, d_input_RR = torch.mm(g_TR.t(), d_h_TR), torch.mm(z_TR.t(), d_h_TR)
    u_TR = n_TR + z_TR if mask_TR is None else torch.addcmul(z_TR, n_TR, mask_TR)
    d_z_TR = torch.addmm(d_z_TR, d_h_TR, input_RR.to(h_TR.dtype).t())
    d_h_prev = h_prev_BSR.new_empty(0)
    if needs_d_h_prev:
        d_h_prev = torch.addmm(d_h_TR, d_h_TR, transition_RR.to(h_TR.dtype).t()).to(h_prev_BSR.dtype)
        d_h_prev = d_h_prev.view(z_BSR.shape)
    return (
        u_TR.mul_(recurrence.scaling).to(z_BSR.dtype).view(z_BSR.shape),
        d_z_TR.to(z_BSR.dtype).view(z_BSR.shape),
        d_h_prev,
        d_transition_RR.to(transition_RR.dtype),
        d_input_RR.to(input_RR.dtype),
    )


def _state(
    z_BSR: Tensor, h_prev_BSR: Tensor, transition_RR: Tensor, input_RR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """h_prev, z and h [T,R] in the dtype of state arithmetic."""
    dtype = state_dtype(z_BSR.dtype)
    g_TR, z_TR = _rows(h_prev_BSR, dtype), _rows(z_BSR, dtype)
    h_TR = torch.addmm(g_TR, g_TR, transition_RR.to(dtype)).addmm_(z_TR, input_RR.to(dtype))
    return g_TR, z_TR, h_TR


def _rows(tensor_BSR: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor_BSR.reshape(-1, tensor_BSR.shape[-1]).to(dtype)


def _dropout_factors(
    z_BSR: Tensor, dtype: torch.dtype, seeds: Tensor | None, recurrence: Recurrence
) -> Tensor | None:
    """K [T,R]: 1 / (1 - p) where the normalised state is kept, 0 where it is dropped."""
    if seeds is None or not recurrence.dropout:
        return None
    kept = keep_mask(seeds, recurrence.dropout_id, z_BSR.shape[-1], recurrence.dropout)
    return _rows(kept, dtype).mul_(1 / (1 - recurrence.dropout))


def _living(measure_T1: Tensor, least: float, offset: float) -> Tensor:
    """What rows are divided by: `measure + offset`; if `measure` is under `least` infinity, which gives 0."""
    return torch.where(measure_T1 >= least, measure_T1 + offset, math.inf)


def _normalized(h_TR: Tensor, normalization: str) -> Tensor:
    """n [T,R], a new tensor unless it is h itself."""
    if normalization == "none":
        return h_TR
    if normalization == "rms":
        return h_TR / _living(h_TR.square().mean(-1, keepdim=True), MIN_SPREAD**2, 0.0).sqrt_()
    assert normalization == "minmax", normalization
    low_T1, high_T1 = torch.aminmax(h_TR, dim=-1, keepdim=True)
    return (h_TR - low_T1).div_(_living(high_T1.sub_(low_T1), MIN_SPREAD, EPSILON))


def _normalized_backward(h_TR: Tensor, d_n_TR: Tensor, normalization: str) -> tuple[Tensor, Tensor]:
    """n and dh [T,R]."""
    if normalization == "none":
        return h_TR, d_n_TR
    if normalization == "rms":
        root_T1 = _living(h_TR.square().mean(-1, keepdim=True), MIN_SPREAD**2, 0.0).sqrt_()
        n_TR = h_TR / root_T1
        along_T1 = (d_n_TR * n_TR).mean(-1, keepdim=True)
        return n_TR, torch.addcmul(d_n_TR, n_TR, along_T1, value=-1).div_(root_T1)
    # Of several least or largest components these are the first, as in the reference.
    (low_T1, first_low_T1), (high_T1, first_high_T1) = h_TR.min(-1, keepdim=True), h_TR.max(-1, keepdim=True)
    divisor_T1 = _living(high_T1.sub_(low_T1), MIN_SPREAD, EPSILON)
    n_TR = (h_TR - low_T1).div_(divisor_T1)
    s0_T1, s1_T1 = d_n_TR.sum(-1, keepdim=True), (d_n_TR * n_TR).sum(-1, keepdim=True)
    d_h_TR = d_n_TR.scatter_add(-1, first_low_T1, s1_T1 - s0_T1).scatter_add_(-1, first_high_T1, s1_T1.neg_())
    return n_TR, d_h_TR.div_(divisor_T1)
