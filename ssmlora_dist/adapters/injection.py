"""Putting adapters into the decoder layers of a model, in place."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.layers import AdapterModule, LoRALinear
from ssmlora_dist.adapters.placement import placement, time_axes
from ssmlora_dist.adapters.projections import linear_layers, named_by
from ssmlora_dist.adapters.state import unwrap_layer, wrap_layer, wrap_stateful_layer
from ssmlora_dist.errors import AdapterError

# What is mostly given one and the same tensor, in one module; `LayerCall.down_project` looks whether it is.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


Adapters = dict[int, dict[str, LoRALinear]]
"""Those of a model by decoder layer, and by path in it."""


def insert_adapters(
    layers: Mapping[int, nn.Module], config: AdapterConfig, *, num_layers: int, prefix: str, seed: int = 0
) -> None:
    """Adapts `layers` in place and hands the state through them; what was there is frozen.

    Every parameter starts as a function of (seed, its full name) alone, so that any split of the layers over
    processes starts the same.

    Args:
        layers: decoder layers by their index in the whole model; all of them, or a pipeline stage's.
        config: where adapters sit and how the state runs, as `projections.resolve` returns it.
        num_layers: L of the whole model.
        prefix: name of the layer list in the whole model, e.g. `model.layers`.
        seed: of the starting values.

    Raises:
        AdapterError: the layers are adapted already.
    """
    attach_adapters(
        layers, _new_adapters(layers, config, prefix=prefix, seed=seed), config, num_layers=num_layers
    )


def attach_adapters(
    layers: Mapping[int, nn.Module], adapters: Adapters, config: AdapterConfig, *, num_layers: int
) -> None:
    """Puts adapters on their linear layers, in place, and hands the state through the decoder layers.

    Args:
        layers: decoder layers without adapters, as for `insert_adapters`.
        adapters: new, or taken out by `detach_adapters`.
        config: of the adapters.
        num_layers: L of the whole model.
    """
    axes = list(time_axes(config))
    for layer_idx, layer in layers.items():
        for path, adapted in adapters[layer_idx].items():
            base_layer = layer.get_submodule(path)
            assert isinstance(base_layer, nn.Linear)
            adapted.base_layer = base_layer
            adapted.train(layer.training)
            _replace(layer, path, adapted)
        if axes:
            state_dtype = getattr(torch, config.state_dtype) if config.state_dtype else None
            is_last = layer_idx == num_layers - 1
            wrap_stateful_layer(
                layer, num_axes=len(axes), rank=config.rank, state_dtype=state_dtype, is_last=is_last
            )
        else:
            wrap_layer(layer)


def detach_adapters(layers: Mapping[int, nn.Module]) -> Adapters:
    """Takes the adapters out again, in place: the layers are the base model's. Returns the adapters.

    Raises:
        AdapterError: something else has changed a layer's class since.
    """
    adapters: Adapters = {}
    for layer_idx, layer in layers.items():
        unwrap_layer(layer)
        own = {path: module for path, module in layer.named_modules() if isinstance(module, LoRALinear)}
        for path, adapted in own.items():
            _replace(layer, path, adapted.base_layer)
        adapters[layer_idx] = own
    return adapters


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapters and saved modules by full name, sorted by name."""
    found: dict[str, nn.Parameter] = {}
    for path, child in module.named_modules():
        if isinstance(child, AdapterModule):
            own = {name: p for name, p in child.named_parameters() if not name.startswith("base_layer.")}
            found.update({f"{path}.{name}" if path else name: p for name, p in own.items()})
    return dict(sorted(found.items()))


def load_adapter_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copies `tensors` (by full name) into the adapters of `module`: one for each parameter, and no others.

    Raises:
        AdapterError: names or shapes that do not fit, naming `source`.
    """
    parameters = adapter_parameters(module)
    for name, parameter in parameters.items():
        if name not in tensors:
            raise AdapterError(f"{source}: lacks {name}; it was saved for another model or placement")
        if tensors[name].shape != parameter.shape:
            raise AdapterError(
                f"{source}: {name} is {list(tensors[name].shape)}, the model needs {list(parameter.shape)}; "
                "it was saved for another base model or rank"
            )
    for name in tensors:
        if name not in parameters:
            raise AdapterError(
                f"{source}: holds {name}, which the model has no adapter for; "
                "it was saved for another model or placement"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _new_adapters(
    layers: Mapping[int, nn.Module], config: AdapterConfig, *, prefix: str, seed: int
) -> Adapters:
    """Adapters that start, beside layers that are frozen and otherwise as they were."""
    axes = list(time_axes(config))
    # Every layer is checked before the first is changed.
    paths = {layer_idx: _paths(layer, placement(config, layer_idx)) for layer_idx, layer in layers.items()}
    adapters: Adapters = {}
    for layer_idx, layer in layers.items():
        layer.requires_grad_(False)
        own = adapters[layer_idx] = {}
        for projection, path in paths[layer_idx].items():
            method = placement(config, layer_idx)[projection]
            base_layer = layer.get_submodule(path)
            assert isinstance(base_layer, nn.Linear)
            adapted = LoRALinear(
                base_layer,
                config.form(method, axes.index(projection) if projection in axes else 0, len(axes)),
                config.alpha,
                config.dropout,
                rslora=config.rslora,
                dropout_id=layer_idx * len(config.targets) + config.targets.index(projection),
                detach_state=config.state_gradient == "detached",
                hands_on=config.carry != "none",
            )
            adapted.reset_parameters(_generator(seed, f"{prefix}.{layer_idx}.{path}"))
            own[path] = adapted
        parents = dict.fromkeys(path.rpartition(".")[0] for path in own)
        for parent, names in itertools.product(parents, SAME_INPUT):
            beside = [own.get(f"{parent}.{name}" if parent else name) for name in names]
            readers = [adapted for adapted in beside if adapted is not None and not adapted.drops_input]
            for reader in readers:
                reader.readers = readers
    return adapters


def _replace(layer: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, module)


def _paths(layer: nn.Module, projections: Iterable[str]) -> dict[str, str]:
    """Paths in `layer` of the linear layers that `projections` name; a layer may lack some."""
    # Ours, or PEFT's.
    if any(hasattr(module, "lora_A") for module in layer.modules()):
        raise AdapterError("the model carries adapters already; load the base model anew to adapt it again")
    paths = {name: named_by(name, list(linear_layers(layer))) for name in projections}
    assert all(len(found) <= 1 for found in paths.values()), "resolved against the model"
    return {name: found[0] for name, found in paths.items() if found}


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
