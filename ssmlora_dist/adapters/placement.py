"""Which projection of which layer gets which adapter: pure functions of the configuration."""

from __future__ import annotations

from ssmlora_dist.adapters.config import AdapterConfig, Method


def placement(config: AdapterConfig, layer_idx: int) -> dict[str, Method]:
    """Projections adapted in layer `layer_idx`, and how: `{"q_proj": "ssmlora", "o_proj": "lora"}`."""
    chosen: dict[str, Method] = {}
    if config.alternate:
        chosen[config.alternate[layer_idx % len(config.alternate)]] = config.method
    for name in config.listed:
        chosen[name] = config.every_layer_method if config.method == "ssmlora" else "lora"
    return chosen


def time_axes(config: AdapterConfig) -> tuple[str, ...]:
    """The projections that form time axes, in the order of the state's axis A; empty for plain LoRA."""
    if config.method == "lora":
        return ()
    every_layer = config.listed if config.every_layer_method == "ssmlora" else ()
    return config.alternate + every_layer
