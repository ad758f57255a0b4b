"""Where a number of parameters goes, by gradients: from measurements to places, all of it pure.

What is measured (`training.probe`): every linear layer that may be adapted carries a plain LoRA whose
`lora_B` is zero, so that the model computes what it did, and the gradient of `lora_B` says how much the loss
would fall if something were added there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping

from torch import nn

from ssmlora_dist.adapters.config import ALL_LINEAR, AdapterConfig, split_place
from ssmlora_dist.adapters.projections import Paths, chosen_layers, linear_layers, shortest_name


def candidates(config: AdapterConfig) -> AdapterConfig:
    """Plain LoRA on all linear layers of `config.layers`."""
    kept = {name: getattr(config, name) for name in ("rank", "alpha", "rslora", "layers")}
    return AdapterConfig(method="lora", alternate=(), every_layer=ALL_LINEAR, **kept)


def candidate_places(
    config: AdapterConfig, layers: Mapping[int, nn.Module], paths: Paths
) -> dict[str, tuple[str, int]]:
    """By place, its linear layer's name (`12.self_attn.q_proj`) and the parameters that an adapter has there.

    In the order of the model. Forms whose parameters depend on the number of time axes are counted with one.

    Args:
        config: of the adapters, of the form `method`.
        layers: all decoder layers by index, adapted or not.
        paths: of the linear layers of each decoder layer.

    Raises:
        AdapterError: `config.layers` that the model has not.
    """
    own = sum(value.numel() for value in config.form(config.method).start_values().values())
    return {
        f"{index}.{shortest_name(path, paths)}": (
            f"{index}.{path}",
            config.rank * (linear.in_features + linear.out_features) + own,
        )
        for index in chosen_layers(config.layers, len(paths))
        for path, linear in linear_layers(layers[index]).items()
    }


def choose_places(
    scores: Mapping[str, float], sizes: Mapping[str, int], num_parameters: int
) -> tuple[str, ...]:
    """The places that parameters are spent on, in the order of `scores`.

    By score per parameter, the best first, and spread over depth: no layer gets a second place before every
    layer has one or nothing more fits there, none a third before every layer has two, until nothing fits into
    what is left.

    Args:
        scores: by place, the squared gradient norm.
        sizes: by place, the parameters of an adapter there.
        num_parameters: to spend at most.
    """
    # A stable sort: of equal ones the first in the model.
    ranked = sorted(scores, key=lambda name: -scores[name] / sizes[name])
    chosen: set[str] = set()
    in_layer: Counter[int] = Counter()
    left = num_parameters
    for most in itertools.count(1):
        waiting = [name for name in ranked if name not in chosen]
        if not any(sizes[name] <= left for name in waiting):
            break
        for name in waiting:
            layer_idx, _ = split_place(name)
            if in_layer[layer_idx] < most and sizes[name] <= left:
                chosen.add(name)
                in_layer[layer_idx] += 1
                left -= sizes[name]
    return tuple(name for name in scores if name in chosen)
