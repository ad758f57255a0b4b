"""A state behind a gate that starts closed.

    h = g + g W_c + z W_d          the state step, g the state received
    n = h / rms h                  rms h = sqrt(mean h^2 + eps), the mean over R, per token
    u = z + K e * n                K = dropout mask / (1 - p)
    handed on: n

| | code | shape | start |
| --- | --- | --- | --- |
| W_c | `state_transition` | [R,R] | zeros |
| W_d | `state_input` | [R,R] | I |
| e | `state_gate` | [R] | zeros: plain LoRA, bit for bit |

Shapes: z, g, h, n, u, K [B,S,R]; B batch, S tokens, R rank.

Gradients, with q = 1 / rms h and the mean over R:

    de = sum(K n * du)            dn = e * K du + d_handed_on
    dh = q (dn - n mean(n * dn))
    dW_c = g^T dh                 dW_d = z^T dh
    dg = dh + dh W_c^T            dz = du + dh W_d^T
"""

from __future__ import annotations

from torch import Tensor

from ssmlora_dist.ops.form import Drop

EPSILON = 1e-10


def state_step(g_BSR: Tensor, z_BSR: Tensor, transition_RR: Tensor, input_RR: Tensor) -> Tensor:
    """h [B,S,R]."""
    return g_BSR + g_BSR @ transition_RR + z_BSR @ input_RR


def rms(h_BSR: Tensor) -> Tensor:
    """sqrt(mean h^2 + eps) [B,S,1]: never zero, so no row needs to be left out."""
    return (h_BSR.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def step(
    z_BSR: Tensor, g_BSR: Tensor, transition_RR: Tensor, input_RR: Tensor, gate_R: Tensor, drop: Drop
) -> tuple[Tensor, Tensor]:
    """u and n, both [B,S,R], in the dtype of z; differentiable in all tensors."""
    h_BSR = state_step(g_BSR, z_BSR, transition_RR, input_RR)
    n_BSR = h_BSR / rms(h_BSR)
    return z_BSR + gate_R * drop(n_BSR), n_BSR
