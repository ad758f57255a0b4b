"""CUDA where there is none: what torch, transformers and this project ask of a device is answered.

`FakeTensorMode` carries shapes, dtypes and devices through every operator without computing. A CPU-only build
of torch refuses the device `cuda` all the same, as soon as autograd asks for its stream: a few lines of C++
(`guard.cpp`) say yes to that. A mix of devices raises as on a GPU.

    with pretended_cuda():
        ...  # tensors of device "cuda", made under a FakeTensorMode
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim.optimizer import _foreach_supported_types as _optimizer_types
from torch.utils._foreach_utils import _foreach_supported_types as _utility_types
from torch.utils._python_dispatch import _disable_current_modes

from ssmlora_dist.errors import SSMLoRAError
from ssmlora_dist.models import attention, loss, recompute
from ssmlora_dist.quantization import fresh_code_books

_SOURCE = Path(__file__).with_name("guard.cpp")
# They have kernels on CUDA; in a build without, torch would take them apart into others.
_KERNELS_OF_CUDA = ("silu_backward", "mish_backward")
CAPABILITY = (9, 0)
"""Of the device that is pretended: Hopper's."""
MEMORY_BYTES = 80 * 2**30
# Flash attention computes in these, and heads of at most so many components.
_FLASH_DTYPES, _FLASH_HEAD_SIZE = (torch.bfloat16, torch.float16), 256


class FakeCudaError(SSMLoRAError):
    """Pretending is not possible on this machine."""


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Within, autograd takes fake tensors of the device `cuda`, and libraries treat them as real ones.

    For one thread at a time, and not on a machine whose CUDA devices are in use by this process.

    Raises:
        FakeCudaError: there is no C++ compiler, or it fails.
    """
    guard = _guard()
    guard.pretend_cuda()
    try:
        with ExitStack() as stack:
            stack.enter_context(as_real_tensors())
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            for target, name, value in _answers():
                stack.enter_context(mock.patch.object(target, name, value))
            # It keeps streams of the device.
            stack.callback(recompute._copier.cache_clear)
            recompute._copier.cache_clear()
            yield
    finally:
        guard.stop_pretending()


@contextmanager
def as_real_tensors() -> Iterator[None]:
    """Within, libraries and this project go the ways of real tensors with fake ones, on any device."""
    from transformers.utils import import_utils

    with (
        # Otherwise transformers takes them for a graph that is traced, and makes masks that no step needs.
        mock.patch.object(import_utils, "is_fake_tensor", return_value=False),
        mock.patch.object(FakeTensor, "tolist", _tolist),
        mock.patch.object(FakeTensor, "_use_count", _use_count),
        # Both compare numbers that are there.
        mock.patch.object(loss, "_is_the_models_own", _really(loss._is_the_models_own)),
        mock.patch.object(attention, "_is_causal", _really(attention._is_causal)),
        # What is done to many tensors at a time.
        _also_fake(_optimizer_types),
        _also_fake(_utility_types),
        fresh_code_books(),
    ):
        yield


@functools.cache
def _guard() -> Any:
    """The compiled guard: once a process, in two seconds."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise FakeCudaError("fake CUDA needs the C++ compiler g++, which is not installed; install it")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "guard.so"
        command = [compiler, "-O0", "-std=c++20", "-shared", "-fPIC", str(_SOURCE), "-o", str(library)]
        command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FakeCudaError(
                f"fake CUDA: g++ cannot compile against torch {torch.__version__}: {done.stderr}"
            )
        guard = ctypes.CDLL(str(library))
    _register_kernels()
    return guard


def _register_kernels() -> None:
    for name in _KERNELS_OF_CUDA:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            _library.impl(name, lambda *_: None, "CUDA")


# Kept: what it has registered goes with it.
_library = torch.library.Library("aten", "IMPL")


def _answers() -> list[tuple[Any, str, Any]]:
    """What is asked of CUDA in Python."""
    functional = torch.nn.functional
    return [
        (torch.cuda, "Stream", PretendedStream),
        (torch.cuda, "current_stream", PretendedStream),
        (torch.cuda, "stream", lambda _: nullcontext()),
        (torch.cuda, "synchronize", lambda _=None: told("synchronize")),
        # Of a device that is there none of its memory is touched.
        (FakeTensorMode, "avoid_device_init", True),
        (Tensor, "pin_memory", _pin_memory),
        (torch.cuda, "get_device_capability", lambda _=None: CAPABILITY),
        (functional, "scaled_dot_product_attention", _attention(functional.scaled_dot_product_attention)),
    ]


def _pin_memory(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor)


@contextmanager
def one_device() -> Iterator[None]:
    """Within `pretended_cuda`: what DeepSpeed asks of the device that this process computes on."""
    major, minor = CAPABILITY
    properties = SimpleNamespace(total_memory=MEMORY_BYTES, major=major, minor=minor)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "empty_cache": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "get_device_properties": properties,
    }
    with ExitStack() as stack:
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        for name in ("Event", "default_stream"):
            stack.enter_context(mock.patch.object(torch.cuda, name, PretendedStream))
        stack.enter_context(mock.patch.object(Tensor, "record_stream"))
        # The model is there already, and torch does not move parameters to which others refer.
        stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
        yield


class PretendedStream:
    """A stream on which nothing runs, and an event in it."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: PretendedStream | None = None) -> None:
        """Costs the host nothing."""

    def wait(self, stream: PretendedStream | None = None) -> None:
        """Alike."""

    def query(self) -> bool:
        """All is done."""
        return True

    def wait_stream(self, stream: PretendedStream) -> None:
        """Alike."""

    def wait_event(self, event: PretendedStream) -> None:
        """Alike."""

    def record_event(self) -> PretendedStream:
        """What others wait for."""
        return self

    def synchronize(self) -> None:
        """The host waits."""
        told("synchronize")


def told(what: str) -> None:
    """Notes a synchronisation that no operator shows, if a mode of this thread counts them."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in _get_current_dispatch_mode_stack():
        if hasattr(mode, "note_sync"):
            mode.note_sync(what)


def _tolist(tensor: Tensor) -> Any:
    """Ones, in the shape of the tensor."""
    if tensor.device.type != "cpu":
        told("tolist")
    value: Any = True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
    for size in reversed(tensor.shape):
        value = [value] * size
    return value


def _use_count(tensor: Tensor) -> int:
    """As of a real tensor: of a fake one, torch refers to what it has views of once more."""
    count = Tensor._use_count(tensor)  # type: ignore[attr-defined]
    return count - (count > 2)  # type: ignore[no-any-return]


def _attention(on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch's attention as it chooses among its CUDA kernels: a CPU build knows none of them."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "cuda":
            return on_cpu(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if enable_gqa and key.shape[1] != query.shape[1]:
            takes_groups = attn_mask is None and _is_for_flash(query)
            if not takes_groups:
                times = query.shape[1] // key.shape[1]
                key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
        aten = torch.ops.aten
        if attn_mask is None and _is_for_flash(query):
            output, *_ = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )
            return output  # type: ignore[no-any-return]
        bias = None
        if attn_mask is not None:
            bias = attn_mask
            if attn_mask.dtype == torch.bool:
                bias = torch.zeros_like(attn_mask, dtype=query.dtype)
                bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        output, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )
        return output  # type: ignore[no-any-return]

    return attend


def _is_for_flash(query: Tensor) -> bool:
    return query.dtype in _FLASH_DTYPES and query.shape[-1] <= _FLASH_HEAD_SIZE


def _really(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` outside of all modes."""

    def run(*args: Any) -> Any:
        with unset_fake_temporarily(), _disable_current_modes():
            return function(*args)

    return run


@contextmanager
def _also_fake(types: list[Any]) -> Iterator[None]:
    types.append(FakeTensor)
    try:
        yield
    finally:
        types.remove(FakeTensor)
