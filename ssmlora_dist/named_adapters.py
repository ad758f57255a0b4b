"""The adapters of one model by name: one is active, the others lie beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.injection import Adapters, adapter_parameters, attach_adapters, detach_adapters
from ssmlora_dist.adapters.layers import AdapterModule
from ssmlora_dist.adapters.saved import SavedModule, put_in, take_out
from ssmlora_dist.adapters.state import list_adapters
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.structure import decoder_layers, structure_of
from ssmlora_dist.records import nearest_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class InactiveAdapter:
    """An adapter that takes no part in the model's passes; its modules by layer and path, or by path."""

    config: AdapterConfig
    adapters: Adapters
    saved: dict[str, SavedModule]


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
    modules: dict[str, AdapterModule] = {
        f"{prefix}.{layer_idx}.{path}": adapted
        for layer_idx, own in inactive.adapters.items()
        for path, adapted in own.items()
    }
    return inactive.config, {
        f"{path}.{parameter_name}": parameter
        for path, module in (modules | inactive.saved).items()
        for parameter_name, parameter in adapter_parameters(module).items()
    }


def deactivate(model: PreTrainedModel) -> None:
    """Takes the active adapter off the model and keeps it beside that, by its name."""
    adapters = detach_adapters(decoder_layers(model))
    model.ssmlora_inactive[model.ssmlora_active] = InactiveAdapter(
        model.ssmlora_config, adapters, take_out(model)
    )


def activate(model: PreTrainedModel, name: str) -> None:
    """Puts an inactive adapter on the model, where there is none."""
    chosen: InactiveAdapter = model.ssmlora_inactive.pop(name)
    lora = [adapted for own in chosen.adapters.values() for adapted in own.values()]
    for adapted in (*lora, *chosen.saved.values()):
        adapted.follow_base_layer()
    layers = decoder_layers(model)
    attach_adapters(layers, chosen.adapters, chosen.config, num_layers=structure_of(model).num_layers)
    attach_saved(model, chosen.saved)
    model.ssmlora_active, model.ssmlora_config = name, chosen.config


def attach_saved(model: PreTrainedModel, saved: Mapping[str, SavedModule]) -> None:
    """Puts saved modules into a model whose layers have their adapters."""
    put_in(model, saved)
    for layer in decoder_layers(model).values():
        list_adapters(layer)
