"""Another sample's state: row b of the batch receives what row b + 1 handed on, the last that of the first.

    g_b = h_prev_(b+1)        then as SSMLoRA, ops/ssmlora/README.md

Shapes: g, h_prev [B,S,R]; B batch, S tokens, R rank. No parameters beyond those of SSMLoRA.
"""

from __future__ import annotations

from torch import Tensor


def received(state_BSR: Tensor) -> Tensor:
    """g [B,S,R] of h_prev [B,S,R]."""
    return state_BSR.roll(-1, 0)
