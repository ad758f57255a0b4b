"""Which projection of which layer gets which adapter: pure functions of the configuration."""

from __future__ import annotations

from ssmlora_dist.adapters.config import AdapterConfig, split_place
from ssmlora_dist.ops.registry import form_named


def adapts(config: AdapterConfig, layer_idx: int) -> bool:
    """Whether a resolved `layers` has layer `layer_idx`."""
    return config.layer_indices is None or layer_idx in config.layer_indices


def placement(config: AdapterConfig, layer_idx: int) -> dict[str, str]:
    """Projections adapted in layer `layer_idx`, and the form: `{"q_proj": "ssmlora", "o_proj": "lora"}`."""
    if config.places:
        own = (name for index, name in map(split_place, config.places) if index == layer_idx)
        return dict.fromkeys(own, config.method)
    if not adapts(config, layer_idx):
        return {}
    chosen = dict.fromkeys(config.listed, config.every_layer_method)
    if config.alternate:
        turn = layer_idx if config.layer_indices is None else config.layer_indices.index(layer_idx)
        chosen = {config.alternate[turn % len(config.alternate)]: config.method, **chosen}
    return chosen


def forms_by_projection(config: AdapterConfig) -> dict[str, str]:
    """The form of every projection that is adapted anywhere, in the order of `config.targets`."""
    if config.places:
        return dict.fromkeys(config.targets, config.method)
    alternate = dict.fromkeys(config.alternate, config.method)
    return alternate | dict.fromkeys(config.listed, config.every_layer_method)


def time_axes(config: AdapterConfig) -> dict[str, str]:
    """The projections that form time axes, in the order of the state's axis A, and their forms."""
    return {name: form for name, form in forms_by_projection(config).items() if form_named(form).has_state}
