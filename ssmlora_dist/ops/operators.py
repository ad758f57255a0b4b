"""The operators of the adapters, registered with torch as `torch.ops.ssmlora.dropout` and its like.

Each is there in plain torch and, on CUDA with Triton installed, as a Triton kernel. To torch.compile they are
single nodes. None records gradients: that is for the functions of `fused`, which call them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlora_dist.ops.dropout import dropout

_library = torch.library.Library("ssmlora", "DEF")


def register_operator(
    function: Callable[..., Any], schema: str, fake: Callable[..., Any], kernels: str
) -> None:
    """Registers `function` under its name.

    Args:
        function: in plain torch, for every device.
        schema: its arguments and results, in torch's notation.
        fake: gives results without values.
        kernels: the module of its Triton kernel, which has its name, and of `takes`, which says of the first
            tensor whether that kernel is for it.
    """
    name = function.__name__
    _library.define(name + schema)
    _library.impl(name, function, "CPU")
    _library.impl(name, _fastest(function, kernels), "CUDA")
    for device in ("CPU", "CUDA"):
        _library.impl(name, _without_autocast(name, device.lower()), f"Autocast{device}")
    torch.library.register_fake(f"ssmlora::{name}", fake, lib=_library)


@functools.cache
def _triton_kernels(module: str) -> Any:
    """The module of Triton kernels, or None where Triton is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _fastest(plain: Callable[..., Any], module: str) -> Callable[..., Any]:
    """`plain`, or the Triton kernel of that name for what it takes."""

    def run(tensor: Tensor, *rest: Any) -> Any:
        kernels = _triton_kernels(module)
        is_taken = kernels is not None and kernels.takes(tensor)
        return (getattr(kernels, plain.__name__) if is_taken else plain)(tensor, *rest)

    return run


def _without_autocast(name: str, device: str) -> Callable[..., Any]:
    """The operator as it is: none of its products may be rounded."""

    def run(*arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.ssmlora, name)(*arguments)

    return run


def _fake_dropout(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


register_operator(
    dropout,
    "(Tensor x, Tensor seeds, int dropout_id, float probability) -> Tensor",
    _fake_dropout,
    "ssmlora_dist.ops.triton_dropout",
)
