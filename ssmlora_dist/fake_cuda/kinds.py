"""Which module of a model computes what kind of bytes."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.projections import EXPERTS, linear_layers
from ssmlora_dist.fake_cuda.watch import ADAPTERS, ATTENTION, LOGITS, MLP, NORMS, OTHER
from ssmlora_dist.models import decoder_layers, structure_of


def kinds_of(module: Any) -> dict[nn.Module, str]:
    """The kinds of `watch.KINDS` that modules of a loss compute."""
    model = module.model
    kinds: dict[nn.Module, str] = {module: LOGITS, model: LOGITS}
    structure = structure_of(model)
    kinds[model.get_submodule(structure.decoder)] = OTHER
    for layer in decoder_layers(model).values():
        kinds[layer] = OTHER
        for child in layer.children():
            if not (linear_layers(child) or isinstance(child, nn.Linear) or _has_experts(child)):
                continue
            kinds[child] = ATTENTION if "Attention" in type(child).__name__ else MLP
            for inner in child.modules():
                if isinstance(inner, LoRALinear):
                    kinds |= {inner: ADAPTERS, inner.base_layer: kinds[child]}
    for inner in model.modules():
        if type(inner).__name__.endswith("Norm"):
            kinds[inner] = NORMS
    return kinds | {module.head: LOGITS}


def _has_experts(module: nn.Module) -> bool:
    return any(hasattr(inner, EXPERTS) for inner in module.modules())
