"""The state step and its gradient as operators: `torch.ops.ssmlora.state_forward` and `state_backward`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmlora_dist.ops.operators import register_operator
from ssmlora_dist.ops.ssmlora.state_step import state_backward, state_forward

_RECURRENCE = "float scaling, str normalization, str carry, float dropout, int dropout_id"
_STATE = f"Tensor z, Tensor h_prev, Tensor transition, Tensor input, Tensor? seeds, {_RECURRENCE}"
_GRADIENTS = "Tensor d_u, Tensor? d_carried, bool needs_d_h_prev"
_KERNELS = "ssmlora_dist.ops.ssmlora.triton_kernels"


def _fake_forward(z: Tensor, h_prev: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), h_prev.new_empty(z.shape)


def _fake_backward(
    d_u: Tensor, _: Any, needs_d_h_prev: bool, z: Tensor, h_prev: Tensor, transition: Tensor, *__: Any
) -> tuple[Tensor, ...]:
    d_h_prev = h_prev.new_empty(z.shape if needs_d_h_prev else 0)
    matrices = (transition.new_empty(transition.shape) for _ in range(2))
    return z.new_empty(z.shape), z.new_empty(z.shape), d_h_prev, *matrices


register_operator(state_forward, f"({_STATE}) -> (Tensor, Tensor)", _fake_forward, _KERNELS)
register_operator(
    state_backward,
    f"({_GRADIENTS}, {_STATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    _KERNELS,
)
