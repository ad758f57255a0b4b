"""Mixing a class of ours into that of a module that is there already."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


def mix_in(module: nn.Module, mixin: type) -> None:
    """Puts `mixin` before the class of `module`, in place; the module can be copied and pickled as before.

    The class keeps its name, by which transformers and others look classes up.
    """
    module.__class__ = _mixed(mixin, type(module))


@functools.cache
def _mixed(mixin: type, own: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (mixin, own), {**names, "__reduce_ex__": _reduce})


def _reduce(module: nn.Module, _: Any) -> tuple[Any, ...]:
    # A class made at run time has no name by which another process could find it; its bases have.
    return _without_state, type(module).__bases__, module.__getstate__()


def _without_state(mixin: type, own: type[nn.Module]) -> nn.Module:
    mixed = _mixed(mixin, own)
    return mixed.__new__(mixed)
