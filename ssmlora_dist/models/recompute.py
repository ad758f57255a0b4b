"""What gradient checkpointing keeps until the backward pass: the inputs of one or several decoder layers.

A model's own loop calls its layers one by one. Where several share a checkpoint, all but the last only note
how they were called; the last one runs them all, as one function of (hidden, state). What is kept stays on
the device or, with `offload`, goes to host memory: each copy runs beside the layers that are computed
meanwhile, and in the backward pass the next one comes back while layers are recomputed from the last.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ssmlora_dist.errors import ModelError

# How often one is compiled at most.
_CODES_OF_A_LAYER = 8
Layer = Callable[..., Any]
"""What a decoder layer computes: hidden states [B,S,D], or a pair of them and the state, to the same."""


class PendingLayers(dict[str, Any]):
    """In the place of hidden states between layers of one checkpoint, none of which has run.

    A dictionary, and an empty one: engines that look for tensors in what modules return pass over it.

    Args:
        inputs: of the first of the layers.
        calls: the layers, each a function of what the one before returns.
    """

    def __init__(self, inputs: Any, calls: tuple[Layer, ...]) -> None:
        super().__init__()
        self.inputs, self.calls = inputs, calls
        hidden_BSD = inputs[0] if isinstance(inputs, tuple) else inputs
        self.shape, self.device = hidden_BSD.shape, hidden_BSD.device

    def __getattr__(self, name: str) -> NoReturn:
        raise _not_handed_on(name)

    def __getitem__(self, key: object) -> NoReturn:
        raise _not_handed_on(str(key))


def note_layer(layer: Layer, inputs: Any, *rest: Any, compiled: bool = False) -> PendingLayers:
    """In the place of `checkpoint`, for a layer that shares one with the next: it will run when that runs."""
    calls, call = (), functools.partial(_compiled_call() if compiled else _call, layer, rest)
    if isinstance(inputs, PendingLayers):
        inputs, calls = inputs.inputs, inputs.calls
    return PendingLayers(inputs, (*calls, call))


def run_layers(layer: Layer, inputs: Any, *rest: Any, offload: bool, compiled: bool = False) -> Any:
    """In the place of `checkpoint`, for a layer and those noted before it: all under one checkpoint.

    Args:
        layer: the last of them.
        inputs: hidden states [B,S,D], a pair of them and the state, or what `note_layer` has returned.
        rest: what else the layer is called with.
        offload: keep the inputs in host memory until the backward pass.
        compiled: whether this layer is: see `compile_layers`.
    """
    noted = note_layer(layer, inputs, *rest, compiled=compiled)
    is_pair, calls = isinstance(noted.inputs, tuple), noted.calls

    def run(*tensors: Tensor) -> Any:
        passed: Any = tensors if is_pair else tensors[0]
        for call in calls:
            passed = call(passed)
        return passed

    tensors = noted.inputs if is_pair else (noted.inputs,)
    if not offload or not torch.is_grad_enabled():
        return checkpoint(run, *tensors, use_reentrant=False)
    kept = _KeptInputs(_copier(tensors[0].device), len(tensors))
    # Around the checkpoint, whose own hooks take what is saved within it: these see its inputs alone.
    with saved_tensors_hooks(kept.pack, _unpack):
        return checkpoint(run, *tensors, use_reentrant=False)


def compile_layers(layers: Sequence[Any]) -> None:
    """Has torch.compile make code of each decoder layer when it is first called, in place.

    A checkpoint stays around a layer, so that what is recomputed is the same code; such a layer is compiled
    for training alone. To the compiler an adapter's operators are single nodes.

    Args:
        layers: as `checkpoint_layers` has left them.
    """
    limits: Any = torch._dynamo.config
    # The layers share their functions, of which the compiler makes code for each: with its dropout, and anew
    # for rows of other lengths, of any length, and without gradients.
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(limits, name, max(getattr(limits, name), _CODES_OF_A_LAYER * len(layers)))
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            run = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = functools.partial(run, compiled=True)
        else:
            layer.compile()


def _call(layer: Layer, rest: tuple[Any, ...], inputs: Any) -> Any:
    return layer(inputs, *rest)


@functools.cache
def _compiled_call() -> Callable[..., Any]:
    return torch.compile(_call)


def _not_handed_on(name: str) -> ModelError:
    return ModelError(
        f"training.layers_per_checkpoint: more than 1 given for a model that looks at hidden states between "
        f"its decoder layers ({name}), where several layers share a checkpoint; set it to 1"
    )


class Copier:
    """Copies between a device and host memory, on a stream of its own; on a CPU there is nothing beside.

    torch's `save_on_cpu` copies on the stream that computes, and fetches when it is too late to overlap;
    DeepSpeed's offloading does not see tensors in a pair, and fetches as late.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        """Of the shape and dtype of `tensor`, pinned if there is a device to copy from."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self.stream is not None)

    def empty_on_device(self, tensor: Tensor) -> Tensor:
        """Of the shape and dtype of `tensor`."""
        return torch.empty_like(tensor, device=self.device)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Begins to fill `target`; what `wait` takes."""
        if self.stream is None:
            target.copy_(source)
            return None
        # Behind what fills the source, and behind what last used the memory of the target.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Has what is computed from now on wait for a copy, and for those begun before."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)


_copier = functools.cache(Copier)


class _Latest(threading.local):
    """What this thread's forward pass has kept last, if that is still needed."""

    kept: Callable[[], _KeptInputs | None] = staticmethod(lambda: None)


_latest = _Latest()


class _KeptInputs:
    """The inputs of one checkpoint in host memory.

    They leave the device when the next checkpoint's follow, and the copy is done by then or waited for: the
    last one's are still there when the backward pass begins with them.

    Args:
        copier: of their device.
        number: how many tensors they are.
    """

    def __init__(self, copier: Copier, number: int) -> None:
        self.copier, self.number = copier, number
        self.on_host: list[Tensor] = []
        self.on_device: list[Tensor] = []
        self.copied: Any = None
        self.before = _latest.kept
        _latest.kept = weakref.ref(self)

    def pack(self, tensor: Tensor) -> tuple[_KeptInputs, int]:
        """Begins to copy one of them, which is needed no more once that is done."""
        self.on_host.append(self.copier.empty_on_host(tensor))
        self.on_device.append(tensor)
        self.copied = self.copier.copy(self.on_host[-1], tensor)
        if len(self.on_host) == self.number and (before := self.before()) is not None:
            before.leave_device()
        return self, len(self.on_host) - 1

    def leave_device(self) -> None:
        """Gives the memory back."""
        self.copier.wait(self.copied)
        self.on_device = []

    def fetch(self) -> None:
        """Begins to copy them back."""
        if not self.on_device:
            self.on_device = [self.copier.empty_on_device(tensor) for tensor in self.on_host]
            for target, source in zip(self.on_device, self.on_host, strict=True):
                self.copied = self.copier.copy(target, source)

    def unpack(self, index: int) -> Tensor:
        """One of them on the device again, for the recompute, in which those before are fetched."""
        self.fetch()
        self.copier.wait(self.copied)
        tensor = self.on_device[index]
        if index == self.number - 1:
            self.on_device = []
            if (before := self.before()) is not None:
                before.fetch()
        return tensor

    def __del__(self) -> None:
        # A pass that was given up: nobody may be given memory that is still being filled.
        if self.on_device:
            self.copier.wait(self.copied)


def _unpack(packed: tuple[_KeptInputs, int]) -> Tensor:
    kept, index = packed
    return kept.unpack(index)
