"""Modules of the base model that are trained whole beside the adapters, such as norms: `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ssmlora_dist.adapters.layers import AdapterModule, adapter_dtype


class SavedModule(AdapterModule):
    """Computes what a module of the base model does, with parameters of its own that start as that one's.

    They have its names, and are float32 (float64 of a float64 module); products run in the dtype of its.

    Args:
        base_layer: frozen, without modules of its own. Parameters that ZeRO 3 has sharded are gathered, which
            all ranks do alike.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        for name, parameter in base_layer.named_parameters(recurse=False):
            self.register_parameter(
                name, nn.Parameter(_whole(parameter).to(adapter_dtype(parameter), copy=True))
            )
        self.base_layer = base_layer
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        """Sizes and settings are those of the base layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the base layer returns for these arguments, computed with the parameters here."""
        base: Any = self.base_layer
        if self.is_disabled:
            return base(x, *args, **kwargs)
        # Not by attribute, on which ZeRO 3 gathers a parameter.
        dtypes = {name: parameter.dtype for name, parameter in base.named_parameters(recurse=False)}
        if type(base).forward is nn.Embedding.forward:
            # No copy of the table is made, and the gradients of a token are summed in its precision.
            return F.embedding(x, self.weight, base.padding_idx).to(dtypes["weight"])
        own: dict[str, Any] = {name: p.to(dtypes[name]) for name, p in self.named_parameters(recurse=False)}
        if torch.compiler.is_compiling():
            return functional_call(base, own, (x, *args), kwargs)
        # A copy for each call: what another thread computes with is not touched.
        layer = copy.copy(base)
        layer._parameters = {**dict.fromkeys(base._parameters), **own}
        return layer.forward(x, *args, **kwargs)


def put_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules in the place of those that have their paths, in place."""
    for path, module in modules.items():
        model.set_submodule(path, module)


def take_out(model: nn.Module) -> dict[str, SavedModule]:
    """Gives a model its own modules back, in place; returns those that were there instead."""
    saved = {path: module for path, module in model.named_modules() if isinstance(module, SavedModule)}
    put_in(model, {path: module.base_layer for path, module in saved.items()})
    return saved


@torch.no_grad()
def _whole(parameter: Any) -> Tensor:
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    parameter.all_gather()
    values: Tensor = parameter.detach().clone()
    parameter.partition()
    return values
