"""The operators of the adapters, registered with torch as `torch.ops.ssmlora.dropout` and its like.

Each is there in plain torch and, on CUDA where Triton is installed and can compile, as a Triton kernel. To
torch.compile they are single nodes. None records gradients: that is for the functions of `fused`, which call
them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmlora_dist.last_words import launch_environment
from ssmlora_dist.ops.dropout import dropout

LONGEST_REASON = 300

_library = torch.library.Library("ssmlora", "DEF")


def register_operator(
    function: Callable[..., Any], schema: str, fake: Callable[..., Any], kernels: str | None = None
) -> None:
    """Registers `function` under its name.

    Args:
        function: in plain torch, for every device.
        schema: its arguments and results, in torch's notation.
        fake: gives results without values.
        kernels: the module of its Triton kernel, which has its name, and of `takes`, which says of the first
            tensor whether that kernel is for it; None: there is none.
    """
    name = function.__name__
    _library.define(name + schema)
    _library.impl(name, function, "CPU")
    _library.impl(name, function if kernels is None else _fastest(function, kernels), "CUDA")
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


@functools.cache
def _runs_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the smallest kernel runs on a device: at its first launch Triton compiles with a C compiler."""
    from ssmlora_dist.ops import triton_dropout

    try:
        x = torch.ones(1, 1, 1, device=device, dtype=dtype)
        with _on(device):
            triton_dropout.dropout(x, torch.zeros(1, 1, device=device, dtype=torch.int32), 0, 0.5)
    except torch.OutOfMemoryError:
        raise
    # Of the compiler, the linker, the driver or Triton itself.
    except Exception as error:
        if launch_environment().local_rank == 0:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"Triton cannot run on {device} in {dtype} ({reason[:LONGEST_REASON]}): adapters are "
                "computed by torch's own operators, to the same results but slower. Triton needs a C "
                "compiler and Python's headers: install gcc and python3-dev (Debian, Ubuntu) or "
                "python3-devel (Red Hat)",
                stacklevel=1,
            )
        return False
    return True


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, wherever its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _fastest(plain: Callable[..., Any], module: str) -> Callable[..., Any]:
    """`plain`, or the Triton kernel of that name for what it takes."""

    def run(tensor: Tensor, *rest: Any) -> Any:
        kernels = _triton_kernels(module)
        if kernels is None or not kernels.takes(tensor) or not _runs_kernels(tensor.device, tensor.dtype):
            return plain(tensor, *rest)
        with _on(tensor.device):
            return getattr(kernels, plain.__name__)(tensor, *rest)

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
