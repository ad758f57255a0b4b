"""The operators of the adapters, registered with torch: `torch.ops.ssmlora.state_forward` and its like.

Each has a form in plain torch and, on CUDA with Triton installed, a Triton kernel. To torch.compile they are
single nodes. None records gradients: that is for the functions of `fused`, which call them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlora_dist.ops.dropout import dropout
from ssmlora_dist.ops.state_step import state_backward, state_forward

_RECURRENCE = "float scaling, str normalization, str carry, float dropout, int stream, int first_token"
_STATE = f"Tensor z, Tensor h_prev, Tensor transition, Tensor input, Tensor? seeds, {_RECURRENCE}"
_GRADIENTS = "Tensor d_u, Tensor? d_carried, bool needs_d_h_prev"


def _fake_forward(z: Tensor, h_prev: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), h_prev.new_empty(z.shape)


def _fake_backward(
    d_u: Tensor, _: Any, needs_d_h_prev: bool, z: Tensor, h_prev: Tensor, transition: Tensor, *__: Any
) -> tuple[Tensor, ...]:
    d_h_prev = h_prev.new_empty(z.shape if needs_d_h_prev else 0)
    matrices = (transition.new_empty(transition.shape) for _ in range(2))
    return z.new_empty(z.shape), z.new_empty(z.shape), d_h_prev, *matrices


def _fake_dropout(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@functools.cache
def _triton_kernels() -> Any:
    """The module of the Triton kernels, or None where Triton is not installed."""
    try:
        from ssmlora_dist.ops import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def _fastest(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain`, or the Triton kernel of that name for what it takes."""

    def run(tensor: Tensor, *rest: Any) -> Any:
        kernels = _triton_kernels()
        is_taken = kernels is not None and kernels.takes(name, tensor)
        return (getattr(kernels, name) if is_taken else plain)(tensor, *rest)

    return run


def _without_autocast(name: str, device: str) -> Callable[..., Any]:
    """The operator as it is: none of its products may be rounded."""

    def run(*arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.ssmlora, name)(*arguments)

    return run


_library = torch.library.Library("ssmlora", "DEF")
for _function, _schema, _fake in (
    (state_forward, f"({_STATE}) -> (Tensor, Tensor)", _fake_forward),
    (state_backward, f"({_GRADIENTS}, {_STATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _fake_backward),
    (
        dropout,
        "(Tensor x, Tensor seeds, int stream, float probability, int first_token) -> Tensor",
        _fake_dropout,
    ),
):
    _name = _function.__name__
    _library.define(_name + _schema)
    _library.impl(_name, _function, "CPU")
    _library.impl(_name, _fastest(_name, _function), "CUDA")
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _without_autocast(_name, _device.lower()), f"Autocast{_device}")
    torch.library.register_fake(f"ssmlora::{_name}", _fake, lib=_library)
