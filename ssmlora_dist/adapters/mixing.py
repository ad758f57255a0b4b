"""Mixing a class of ours into that of a module that is there already."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssmlora_dist.errors import AdapterError

_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def mix_in(module: nn.Module, mixin: type[Any]) -> None:
    """Puts `mixin` before the class of `module`, in place; the module can be copied and pickled as before.

    The class keeps its name, by which transformers and others look classes up.
    """
    module.__class__ = _mixed(mixin, type(module))


def unmix(module: nn.Module) -> None:
    """Gives `module` the class back that it had before `mix_in`, in place.

    Raises:
        AdapterError: something else has changed its class since.
    """
    if type(module) not in _classes.values():
        raise AdapterError(
            f"the class of a {type(module).__name__} was changed after its adapters were added, as "
            "fully_shard does; switch and remove adapters before that"
        )
    module.__class__ = type(module).__bases__[1]


def _mixed(mixin: type[Any], own: type[Any]) -> type[Any]:
    bases = (mixin, own)
    if bases not in _classes:
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
        # Another thread may have been quicker.
        _classes.setdefault(bases, type(own.__name__, bases, {**names, "__reduce_ex__": _reduce}))
    return _classes[bases]


def _reduce(module: nn.Module, _: Any) -> tuple[Any, ...]:
    # A class made at run time has no name by which another process could find it; its bases have.
    return _without_state, type(module).__bases__, module.__getstate__()


def _without_state(mixin: type[Any], own: type[Any]) -> nn.Module:
    mixed: Any = _mixed(mixin, own)
    module: nn.Module = mixed.__new__(mixed)
    return module
