"""A constant in the place of the state.

    u = z + K c

Shapes: z, u [B,S,R]; K, the dropout mask / (1 - p), [B,S,R]; c [R], `state_constant`, starts at 0. B batch,
S tokens, R rank.
"""

from __future__ import annotations

from torch import Tensor

from ssmlora_dist.ops.form import Drop


def step(z_BSR: Tensor, constant_R: Tensor, drop: Drop) -> Tensor:
    """u [B,S,R], in the dtype of z; differentiable in both tensors."""
    return z_BSR + drop(constant_R.expand_as(z_BSR))
