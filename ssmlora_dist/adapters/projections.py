"""Projections: the linear layers of a decoder layer, which can be adapted, and their names by PEFT's rules.

A name stands for the paths that end in it: `q_proj` and `self_attn.q_proj` both for `self_attn.q_proj`. Paths
are those in a decoder layer, one list for each layer: the layers of a model need not be alike.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from torch import nn

from ssmlora_dist.adapters.config import ALL_LINEAR, WITHOUT_PROBE, AdapterConfig, split_place
from ssmlora_dist.adapters.layers import AdapterModule, LoRALinear
from ssmlora_dist.adapters.placement import adapts
from ssmlora_dist.errors import AdapterError

Paths = Sequence[Sequence[str]]
"""Of the linear layers of each decoder layer."""
EXPERTS = "experts"
"""transformers' name for the module of all experts of a layer."""


def linear_layers(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a decoder layer by path, dense or quantised; of adapted ones the base layers.

    A linear layer that stands beside experts in one module is a router or a gate, and left out.
    """
    found: dict[str, nn.Linear] = {}
    adapted: set[str] = set()
    for path, module in layer.named_modules():
        parent = path.rpartition(".")[0]
        if isinstance(module, AdapterModule):
            adapted.add(path)
            if isinstance(module, LoRALinear):
                found[path] = module.base_layer
        elif (
            isinstance(module, nn.Linear)
            and parent not in adapted
            and not hasattr(layer.get_submodule(parent), EXPERTS)
        ):
            found[path] = module
    return found


def named_by(name: str, paths: Sequence[str]) -> list[str]:
    """Those of `paths` that `name` stands for."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def shortest_name(path: str, paths: Paths) -> str:
    """The shortest end of `path` that stands for no more than one linear layer of any decoder layer."""
    parts = path.split(".")
    for start in reversed(range(1, len(parts))):
        name = ".".join(parts[start:])
        if all(len(named_by(name, own)) <= 1 for own in paths):
            return name
    return path


def resolve(config: AdapterConfig, prefix: str, paths: Paths) -> AdapterConfig:
    """`config` with every projection of `every_layer` listed by a name that is unique in its decoder layer.

    `layers` become indices from 0, in order; None where they are all. `places` come in the order of the
    model, and alone.

    Args:
        config: what to adapt.
        prefix: name of the list of decoder layers in the model, such as `model.layers`.
        paths: of the linear layers of each decoder layer of the whole model.

    Raises:
        AdapterError: `layers` that the model has not; a name or expression that stands for no linear layer of
            those chosen, or not for one wherever `alternate` or `places` put it, with the nearest names.
    """
    if config.is_unprobed:
        raise AdapterError(
            'adapter: `placement` "probe" finds places by training data, which a run alone has; name '
            '`places`, or set `placement` to "pattern"'
        )
    if config.places:
        alone = {"alternate": (), "every_layer": (), "layers": None}
        return config.model_copy(
            update={**alone, **WITHOUT_PROBE, "places": _resolved_places(config.places, paths)}
        )
    layers = chosen_layers(config.layers, len(paths))
    # Of the others nothing is adapted.
    paths = [own if index in layers else () for index, own in enumerate(paths)]
    for turn, name in enumerate(config.alternate):
        _check_alternate(name, layers[turn :: len(config.alternate)], paths)
    in_turn = {path for own in paths for name in config.alternate for path in named_by(name, own)}
    if isinstance(config.every_layer, tuple):
        names = [each for name in config.every_layer for each in _expanded(name, paths)]
    elif config.every_layer == ALL_LINEAR:
        names = [shortest_name(path, paths) for path in _distinct(paths) if path not in in_turn]
    else:
        names = [shortest_name(path, paths) for path in _matching(config.every_layer, prefix, paths)]
    every_layer = tuple(dict.fromkeys(names))
    for path in _distinct(paths):
        naming = [name for name in (*config.alternate, *every_layer) if named_by(name, [path])]
        if len(naming) > 1:
            raise AdapterError(
                f"adapter: {path} is named more than once, by {' and '.join(map(repr, naming))}; a "
                "projection is adapted once: leave one of them out of `alternate` or `every_layer`"
            )
    chosen = None if len(layers) == len(paths) else layers
    return config.model_copy(update={"every_layer": every_layer, "layers": chosen})


def skipped_layers(config: AdapterConfig, paths: Paths) -> dict[str, list[int]]:
    """For each projection of a resolved `every_layer`, the chosen decoder layers that lack it, if any do."""
    lacking = {
        name: [index for index, own in enumerate(paths) if adapts(config, index) and not named_by(name, own)]
        for name in config.listed
    }
    return {name: layers for name, layers in lacking.items() if layers}


def _distinct(paths: Paths) -> list[str]:
    return list(dict.fromkeys(path for own in paths for path in own))


def chosen_layers(layers: tuple[int, ...] | str | None, num_layers: int) -> tuple[int, ...]:
    """The indices, from 0 and in order, that `AdapterConfig.layers` stands for.

    Raises:
        AdapterError: none, or some that the model has not.
    """
    every = range(num_layers)
    if layers is None:
        return tuple(every)
    allowed = f"the model has {num_layers} layers, 0 to {num_layers - 1} or -{num_layers} to -1"
    if isinstance(layers, str):
        bounds = [int(bound) if bound else None for bound in layers.split(":")]
        if bounds[2:] == [0]:
            raise AdapterError(f'adapter: `layers` "{layers}" has a step of 0; {allowed}; take a step from 1')
        chosen = tuple(sorted(every[slice(*bounds)]))
    else:
        if beyond := [index for index in layers if not -num_layers <= index < num_layers]:
            raise AdapterError(f"adapter: `layers` has {beyond[0]}; {allowed}; choose among these")
        chosen = tuple(sorted({every[index] for index in layers}))
    if not chosen:
        given = f'"{layers}"' if isinstance(layers, str) else "[]"
        raise AdapterError(f"adapter: `layers` {given} chooses none; {allowed}; choose one, or null for all")
    return chosen


def _resolved_places(places: Sequence[str], paths: Paths) -> tuple[str, ...]:
    """In the order of the model, by names that are unique in their decoder layer."""
    found: dict[tuple[int, int], str] = {}
    for each in places:
        index, name = split_place(each)
        if index >= len(paths):
            raise AdapterError(
                f"adapter: `places` has {each!r}; the model has {len(paths)} layers, 0 to {len(paths) - 1}; "
                "choose among these"
            )
        own = paths[index]
        named = named_by(name, own)
        if not named:
            raise _unknown(name, paths, index)
        if len(named) > 1:
            raise AdapterError(
                f"adapter: `places` has {each!r}, which is {' and '.join(named)} in layer {index}; give more "
                "of the path of the one that is meant"
            )
        key = index, own.index(named[0])
        if key in found:
            raise AdapterError(
                f"adapter: `places` has {named[0]} of layer {index} more than once, the last time as "
                f"{each!r}; a projection is adapted once: leave one of them out"
            )
        found[key] = f"{index}.{shortest_name(named[0], paths)}"
    return tuple(found[key] for key in sorted(found))


def _check_alternate(name: str, layers: Sequence[int], paths: Paths) -> None:
    found = [named_by(name, own) for own in paths]
    if not any(found):
        raise _unknown(name, paths)
    for index in layers:
        if len(found[index]) > 1:
            raise AdapterError(
                f"adapter: `alternate` names {name!r}, which is {' and '.join(found[index])} in layer "
                f"{index}; give more of the path of the one that is meant"
            )
        if not found[index]:
            adapted = [own for own in paths if own]
            everywhere = [n for n in _names(paths) if all(named_by(n, own) for own in adapted)]
            instead = (
                f"take one that all layers have ({', '.join(everywhere)})" if everywhere else "leave it out"
            )
            raise AdapterError(
                f"adapter: `alternate` puts {name!r} into layer {index}, which has none: the layers of this "
                f"model differ; {instead}, or name it in `every_layer`, which passes over layers without it"
            )


def _expanded(name: str, paths: Paths) -> Iterator[str]:
    """The name, or names of what it stands for where that is several linear layers of one decoder layer."""
    found = [named_by(name, own) for own in paths]
    if not any(found):
        raise _unknown(name, paths)
    if all(len(own) <= 1 for own in found):
        yield name
    else:
        yield from (shortest_name(path, paths) for path in _distinct(found))


def _matching(expression: str, prefix: str, paths: Paths) -> Iterator[str]:
    """Paths of the linear layers whose full name matches."""
    pattern = re.compile(expression)
    chosen = [
        [path for path in own if pattern.fullmatch(f"{prefix}.{index}.{path}")]
        for index, own in enumerate(paths)
    ]
    if not any(chosen):
        example = next(f"{prefix}.{index}.{path}" for index, own in enumerate(paths) for path in own)
        raise AdapterError(
            f"adapter: `every_layer` is the regular expression {expression!r}, which matches no linear layer "
            f"as a whole; they are called {example} and the like; mend it, or list names: "
            f"{', '.join(_names(paths))}"
        )
    for path in _distinct(chosen):
        left = [i for i, own in enumerate(paths) if path in own and path not in chosen[i]]
        if left:
            raise AdapterError(
                f"adapter: `every_layer` is the regular expression {expression!r}, which matches {path} in "
                f"some layers and not in layer {left[0]}; have it match in every layer, and choose layers by "
                "`layers`"
            )
        yield path


def _names(paths: Paths) -> list[str]:
    return list(dict.fromkeys(shortest_name(path, paths) for path in _distinct(paths)))


def _unknown(name: str, paths: Paths, index: int | None = None) -> AdapterError:
    """That no layer has it, or not layer `index`."""
    if index is None:
        names, they = _names(paths), "they have"
        whose = "model's layers have" if all(paths) else "layers that `layers` chooses have"
    else:
        names, they = [shortest_name(path, paths) for path in paths[index]], "it has"
        whose = f"model's layer {index} has"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return AdapterError(f"adapter: the {whose} no projection {name!r}{hint}; {they} {', '.join(names)}")
