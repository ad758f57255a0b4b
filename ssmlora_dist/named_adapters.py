"""The adapters of one model by name: one is active, the others lie beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.injection import Adapters, adapter_parameters, attach_adapters, detach_adapters
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.structure import decoder_layers, structure_of
from ssmlora_dist.records import nearest_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class InactiveAdapter:
    """An adapter that takes no part in the model's passes; its modules by layer and path."""

    config: AdapterConfig
    adapters: Adapters


def adapter_names(model: PreTrainedModel) -> list[str]:
    """Of the model's adapters, the active one first."""
    active = getattr(model, "ssmlora_active", None)
    return [] if active is None else [active, *model.ssmlora_inactive]


def known_name(model: PreTrainedModel, name: str | None = None) -> str:
    """The name of an adapter that the model has, by default of the active one."""
    names = adapter_names(model)
    if not names:
        raise AdapterError("the model carries no adapter; call add_adapters first")
    if name is None:
        return names[0]
    if name not in names:
        raise AdapterError(
            f"the model has no adapter named {name!r}{nearest_name(name, names)}; it has "
            f"{', '.join(map(repr, names))}"
        )
    return name


def adapter_of(model: PreTrainedModel, name: str) -> tuple[AdapterConfig, dict[str, nn.Parameter]]:
    """Configuration of the adapter `name`, and its parameters by full name."""
    if name == model.ssmlora_active:
        return model.ssmlora_config, adapter_parameters(model)
    inactive: InactiveAdapter = model.ssmlora_inactive[name]
    prefix = structure_of(model).layers
    return inactive.config, {
        f"{prefix}.{layer_idx}.{path}.{parameter_name}": parameter
        for layer_idx, own in inactive.adapters.items()
        for path, adapted in own.items()
        for parameter_name, parameter in adapter_parameters(adapted).items()
    }


def deactivate(model: PreTrainedModel) -> None:
    """Takes the active adapter off the layers and keeps it beside the model, by its name."""
    adapters = detach_adapters(decoder_layers(model))
    model.ssmlora_inactive[model.ssmlora_active] = InactiveAdapter(model.ssmlora_config, adapters)


def activate(model: PreTrainedModel, name: str) -> None:
    """Puts an inactive adapter on the layers, where there is none."""
    chosen: InactiveAdapter = model.ssmlora_inactive.pop(name)
    for adapted in (each for own in chosen.adapters.values() for each in own.values()):
        adapted.follow_base_layer()
    layers = decoder_layers(model)
    attach_adapters(layers, chosen.adapters, chosen.config, num_layers=structure_of(model).num_layers)
    model.ssmlora_active, model.ssmlora_config = name, chosen.config
