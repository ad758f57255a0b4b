"""Counts what a step asks of its device: launches, synchronisations, moved bytes, live bytes by kind."""

from __future__ import annotations

import bisect
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

BACKBONE, ADAPTERS, OPTIMISER = "backbone", "adapters", "optimiser"
CHECKPOINTS, MLP, ATTENTION, NORMS = "checkpoints", "MLP", "attention", "norms"
LOGITS, DEQUANTISED, OTHER = "logits", "dequantised weights", "other"
KINDS = (BACKBONE, ADAPTERS, OPTIMISER, CHECKPOINTS, MLP, ATTENTION, NORMS, LOGITS, DEQUANTISED, OTHER)
"""Of live bytes. `adapters`: parameters, their gradients, and what adapters compute beside the backbone."""

LOAD, FORWARD, RECOMPUTE, BACKWARD, STEP, OPTIMIZER = (
    "load", "forward", "recompute", "backward", "step", "optimizer"
)  # fmt: skip
PHASES = (FORWARD, RECOMPUTE, BACKWARD, STEP, OPTIMIZER)
"""Of launches: `step` is what comes once a step, and uploads."""

# Of torch's caching allocator.
GRAIN_BYTES = 512
# Of a node that adds up the gradient of a parameter.
_LAST_SEQUENCE_NUMBER = 2**63
_PACKAGES = ("ssmlora_dist", "transformers", "bitsandbytes", "deepspeed", "torch/optim", "torch/nn/utils")
# Attribute of fake tensors in host memory that would be pinned.
_PINNED = "_pretended_pinned"
# They launch nothing.
_FREE = frozenset(
    "detach alias _unsafe_view empty empty_like empty_strided new_empty new_empty_strided lift_fresh "
    "lift_fresh_copy _local_scalar_dense sym_size is_same_size is_pinned _pin_memory".split()
)
# What one call launches, where that is more than one kernel; of Triton's backward the sum over its programs.
_LAUNCHES = {
    "state_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "nonzero": 4,
    "_index_put_impl_": 6,
}


class Sync(NamedTuple):
    """The host waits for the device.

    Attributes:
        phase: of `PHASES`.
        what: by which operator.
        site: file:line function of the project, and of the library below it.
        times: how often.
    """

    phase: str
    what: str
    site: str
    times: int


@dataclass
class _Live:
    num_bytes: int
    kind: str


class Watch(TorchDispatchMode):
    """Sees every operator.

    Args:
        device_type: whose storages are counted.
        kinds: of modules: what is made while one runs, or in the backward pass of that, is of its kind.

    Attributes:
        phase: of `PHASES`, to be set with `during`.
        launches: by phase and operator.
        moved_bytes: read and written, by phase.
        peak_bytes: the most that was alive.
        peak_by_kind: what it consisted of.
        host_bytes: alive of what `count_on_host` was given.
        peak_host_bytes: the most of it.
    """

    def __init__(self, device_type: str, kinds: Mapping[nn.Module, str] | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.kinds: Mapping[nn.Module, str] = kinds or {}
        self.phase = LOAD
        self.launches: Counter[tuple[str, str]] = Counter()
        self.moved_bytes: Counter[str] = Counter()
        self._syncs: Counter[tuple[str, str, str]] = Counter()
        self._live: dict[int, _Live] = {}
        self._running: list[str] = []
        # From which number on the nodes of the graph are of which kind.
        self._since: list[int] = []
        self._kind_since: list[str] = []
        self.by_kind: Counter[str] = Counter()
        self.live_bytes = self.peak_bytes = 0
        self.peak_by_kind: dict[str, int] = {}
        self.host_bytes = self.peak_host_bytes = 0

    @property
    def syncs(self) -> list[Sync]:
        """All that was seen, the most frequent first."""
        return [Sync(*key, times) for key, times in self._syncs.most_common()]

    def reset(self) -> None:
        """Begins to count anew, with what is alive."""
        for counted in (self.launches, self.moved_bytes, self._syncs, self._since, self._kind_since):
            counted.clear()  # type: ignore[attr-defined]
        self.peak_bytes, self.peak_by_kind = self.live_bytes, dict(self.by_kind)
        self.peak_host_bytes = self.host_bytes

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What runs within is of `phase`."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def within(self, kind: str | None) -> Iterator[None]:
        """What is made within, and in the backward pass of that, is of `kind`; None changes nothing."""
        if kind is None:
            yield
            return
        self._running.append(kind)
        self._note_kind()
        try:
            yield
        finally:
            self._running.pop()
            self._note_kind()

    def label(self, tensor: Tensor, kind: str) -> None:
        """Makes the storage of `tensor` one of `kind`."""
        if tensor.device.type == self.device_type:
            self._follow(tensor)
        live = self._live.get(tensor.untyped_storage()._cdata)
        if live is not None:
            self.by_kind[live.kind] -= live.num_bytes
            self.by_kind[kind] += live.num_bytes
            live.kind = kind

    def count_on_host(self, tensor: Tensor) -> None:
        """Counts a tensor in host memory, until it goes."""
        num_bytes = tensor.numel() * tensor.itemsize
        self._add_on_host(num_bytes)
        weakref.finalize(tensor.untyped_storage(), self._add_on_host, -num_bytes).atexit = False

    def note_sync(self, what: str) -> None:
        """The host waits here."""
        self._syncs[self._where(), what, _site()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Asked as often as everything else together.
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        name = func.name().partition("::")[2].partition(".")[0]
        results = self._answer(name, args, kwargs)
        if results is None:
            results = func(*args, **kwargs)
        made = [
            t for t in (results if isinstance(results, tuple | list) else (results,)) if isinstance(t, Tensor)
        ]
        if not func.is_view and name not in _FREE:
            self._count(name, args, kwargs, made)
        if kwargs.get("pin_memory"):
            setattr(made[0], _PINNED, True)
        for tensor in made:
            if tensor.device.type == self.device_type:
                self._follow(tensor)
        return results

    def _answer(self, name: str, args: Any, kwargs: Any) -> Any:
        """What cannot be known without data: one that is as good; None: nothing of that kind was asked."""
        tensor = args[0] if args else None
        if not isinstance(tensor, Tensor):
            return None
        on_device = tensor.device.type == "cuda"
        is_fake = isinstance(tensor, FakeTensor)
        if name == "_local_scalar_dense":
            if on_device:
                self.note_sync("item")
            if not is_fake:
                return None
            if tensor.dtype == torch.bool:
                # Whether anything is wrong; in between, whether all of a mask is set.
                return self.phase not in (LOAD, OPTIMIZER)
            return 1.0 if tensor.is_floating_point() else 1
        if name == "equal":
            if on_device:
                self.note_sync("equal")
            return True if is_fake else None
        if name == "nonzero" and is_fake:
            # As if there were one of them in every row.
            if on_device:
                self.note_sync("nonzero")
            return tensor.new_empty((tensor.shape[0] if tensor.dim() else 1, tensor.dim()), dtype=torch.int64)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            if on_device and any(index.device != tensor.device for index in indices):
                self.note_sync("index on another device")
        return None

    def _count(self, name: str, args: Any, kwargs: Any, made: list[Tensor]) -> None:
        given = [t for each in args for t in (each if isinstance(each, tuple | list) else (each,))]
        involved = [t for t in (*given, *made) if isinstance(t, Tensor) and t.device.type == self.device_type]
        if involved:
            where = self._where()
            self.launches[where, name] += _LAUNCHES.get(name, 1)
            self.moved_bytes[where] += sum(tensor.numel() * tensor.itemsize for tensor in involved)
        if name not in ("_to_copy", "copy_") or not made:
            return
        source, target = args[1] if name == "copy_" else args[0], made[0]
        # From memory that is not pinned the host waits in any case.
        goes_on = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        on_host = source if source.device.type == "cpu" else target
        waits = not (goes_on and hasattr(on_host, _PINNED))
        if source.device.type != target.device.type and waits:
            self.note_sync("copy to the host" if target.device.type == "cpu" else "copy from the host")

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        num_bytes = -(-storage.nbytes() // GRAIN_BYTES) * GRAIN_BYTES
        live = self._live[key] = _Live(num_bytes, self._kind())
        self.by_kind[live.kind] += num_bytes
        self.live_bytes += num_bytes
        weakref.finalize(storage, self._forget, key).atexit = False
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_by_kind = self.live_bytes, dict(self.by_kind)

    def _forget(self, key: int) -> None:
        live = self._live.pop(key)
        self.by_kind[live.kind] -= live.num_bytes
        self.live_bytes -= live.num_bytes

    def _add_on_host(self, num_bytes: int) -> None:
        self.host_bytes += num_bytes
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)

    def _where(self) -> str:
        """The phase; what is computed again runs within modules, or records a graph."""
        if self.phase == BACKWARD and (self._running or torch.is_grad_enabled()):
            return RECOMPUTE
        return self.phase

    def _kind(self) -> str:
        if self.phase == LOAD:
            return BACKBONE
        if self.phase == OPTIMIZER:
            return OPTIMISER
        if self._running:
            return self._running[-1]
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return OTHER
        number = node._sequence_nr()
        if number >= _LAST_SEQUENCE_NUMBER:
            return ADAPTERS
        place = bisect.bisect_right(self._since, number)
        return self._kind_since[place - 1] if place else OTHER

    def _note_kind(self) -> None:
        self._since.append(torch._C._autograd._get_sequence_nr())
        self._kind_since.append(self._running[-1] if self._running else OTHER)


def _site() -> str:
    """The innermost place of this project, and the innermost of a library below it."""
    frame: Any = sys._getframe(2)
    below = ""
    while frame is not None:
        path = frame.f_code.co_filename
        package = next((name for name in _PACKAGES if f"/{name}/" in path), None)
        if package is not None and "/fake_cuda/" not in path:
            name = path.rpartition(f"/{package}/")[2]
            place = f"{package}/{name}:{frame.f_lineno} {frame.f_code.co_name}"
            if package == "ssmlora_dist":
                return f"{place} <- {below}" if below else place
            below = below or place
        frame = frame.f_back
    return below or "?"
