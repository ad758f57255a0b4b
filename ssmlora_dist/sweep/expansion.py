"""From a sweep file to its points: pure and deterministic."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssmlora_dist.config.problems import nearest
from ssmlora_dist.config.schema import LONGEST_NAME
from ssmlora_dist.config.shown import shown
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.sweep.cases import LENGTH_KEYS
from ssmlora_dist.sweep.schema import SweepConfig

RANKS_KEY = "launcher.ranks"


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: readable and unique in the sweep; of its run too.
        group: what it shares with points that differ from it in the seed, or in an axis outside `group_by`.
        seed: of the run.
        overrides: its own values by dotted key, beside those that all points share and the seed.
        ranks: processes.
    """

    name: str
    group: str
    seed: int
    overrides: Mapping[str, Any]
    ranks: int


@dataclass(frozen=True)
class _Value:
    """One value of an axis: its part of names, what `exclude` calls it, and what it sets."""

    label: str
    key: Any
    overrides: Mapping[str, Any]


@dataclass
class _Combination:
    labels: dict[str, str]
    keys: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)


def expand(sweep: SweepConfig, source: str = "sweep") -> list[Point]:
    """All points: the grid with one seed after the other, in its order with the last axis fastest; the list.

    So repeats of a point are spread over the time that a sweep takes.

    Args:
        sweep: the sweep file.
        source: for the heading of messages.

    Raises:
        ConfigError: with one line for every problem that can be seen without the run configuration.
    """
    lines = [*_reserved(sweep), *_axes_problems(sweep)]
    if lines:
        raise ConfigError(lines, source)
    combinations = _combinations(sweep)
    lines += _exclude_problems(sweep, combinations)
    kept = [found for found in combinations if not any(_matches(entry, found) for entry in sweep.exclude)]
    group_by = sweep.group_by or _methods(sweep)
    points = [
        _point(
            "_".join(found.labels.values()),
            "_".join(found.labels[axis] for axis in group_by if axis in found.labels),
            seed,
            found.overrides,
            sweep,
        )
        for seed in sweep.seeds
        for found in kept
    ]
    points += [
        _point(listed.name, listed.name, seed, listed.overrides, sweep)
        for listed in sweep.list_
        for seed in listed.seeds or sweep.seeds
    ]
    lines += [*_point_problems(points), *_group_problems(sweep, points)]
    if not points:
        lines.append("exclude: leaves no point; remove an entry, or add to the grid or the list")
    if lines:
        raise ConfigError(lines, source)
    return points


def _methods(sweep: SweepConfig) -> tuple[str, ...]:
    """The axes that are compared: all but those of input length, along which every method is shown."""
    axes = tuple(axis for axis in sweep.grid if not _axis_keys(sweep, axis) & set(LENGTH_KEYS))
    return axes or tuple(sweep.grid)


def _axis_keys(sweep: SweepConfig, axis: str) -> set[str]:
    values = sweep.grid[axis]
    return {key for one in values.values() for key in one} if isinstance(values, Mapping) else {axis}


def _point(stem: str, group: str, seed: int, overrides: Mapping[str, Any], sweep: SweepConfig) -> Point:
    own = {key: value for key, value in overrides.items() if key != RANKS_KEY}
    shared = sweep.overrides.get(RANKS_KEY, sweep.launcher.ranks)
    ranks = overrides.get(RANKS_KEY, shared)
    if RANKS_KEY in overrides:
        own[RANKS_KEY] = ranks
    return Point(f"{stem}_seed-{seed}", group, seed, own, ranks)


def _values(axis: str, values: Sequence[Any] | Mapping[str, Mapping[str, Any]]) -> list[_Value]:
    last = axis.rpartition(".")[2]
    if isinstance(values, Mapping):
        # A bare number would not say what it is of.
        return [
            _Value(_slug(name if name[0].isalpha() else f"{last}-{name}"), name, overrides)
            for name, overrides in values.items()
        ]
    return [_Value(_slug(f"{last}-{_text(value)}"), value, {axis: value}) for value in values]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "-".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "empty"


def _combinations(sweep: SweepConfig) -> list[_Combination]:
    if not sweep.grid:
        return []
    axes = [[(axis, value) for value in _values(axis, values)] for axis, values in sweep.grid.items()]
    found = []
    for chosen in itertools.product(*axes):
        one = _Combination(
            {axis: value.label for axis, value in chosen}, {axis: value.key for axis, value in chosen}
        )
        for _, value in chosen:
            one.overrides |= value.overrides
        found.append(one)
    return found


def _matches(entry: Mapping[str, Any], combination: _Combination) -> bool:
    known = combination.overrides | combination.keys
    return all(key in known and known[key] == value for key, value in entry.items())


def _sets_of_overrides(sweep: SweepConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every place in the file that sets values, and what it sets."""
    yield "overrides", sweep.overrides
    for axis, values in sweep.grid.items():
        if isinstance(values, Mapping):
            for name, overrides in values.items():
                yield f"grid.{axis}.{name}", overrides
        else:
            for value in values:
                yield "grid", {axis: value}
    for index, listed in enumerate(sweep.list_):
        yield f"list.{index}.overrides", listed.overrides


def _reserved(sweep: SweepConfig) -> Iterator[str]:
    for where, overrides in _sets_of_overrides(sweep):
        for key, value in overrides.items():
            section = key.partition(".")[0]
            if "=" in key or key != key.strip() or not all(key.split(".")):
                yield f"{where}: {shown(key)} given; allowed: a dotted key such as adapter.rank; write one"
            elif section == "run":
                yield (
                    f"{where}.{key}: {shown(value)} given; the sweep names, places and seeds its runs; "
                    "remove it, and list seeds in `seeds`"
                )
            elif section == "launcher" and key != RANKS_KEY:
                yield f"{where}.{key}: unknown key; allowed of launcher: {RANKS_KEY}; remove it"
            elif key == RANKS_KEY and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                yield f"{where}.{key}: {shown(value)} given; allowed: a whole number >= 1; write one"


def _axes_problems(sweep: SweepConfig) -> Iterator[str]:
    if not sweep.grid and not sweep.list_:
        yield "grid: empty, and so is list; allowed: at least one axis or one listed point; add one"
    keys: dict[str, set[str]] = {}
    for axis, values in sweep.grid.items():
        if not values:
            yield f"grid.{axis}: empty; allowed: at least one value; add one, or remove the axis"
        own = _axis_keys(sweep, axis)
        for other, others in keys.items():
            for key in sorted(own):
                clash = next((held for held in sorted(others) if _overlap(key, held)), None)
                if clash is not None:
                    yield (
                        f"grid.{axis}: sets {key}, and grid.{other} sets {clash}; allowed: one axis for a "
                        "key; put both into one axis with named values"
                    )
        keys[axis] = own


def _overlap(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def _exclude_problems(sweep: SweepConfig, combinations: Sequence[_Combination]) -> Iterator[str]:
    known = sorted({key for found in combinations for key in (*found.keys, *found.overrides)})
    for index, entry in enumerate(sweep.exclude):
        unknown = [key for key in entry if key not in known]
        for key in unknown:
            near = nearest(key, known)
            remedy = f"did you mean {near}?" if near else "name an axis, or a key that an axis sets"
            yield f"exclude.{index}.{key}: no axis of the grid sets it; allowed: {', '.join(known)}; {remedy}"
        if not unknown and not any(_matches(entry, found) for found in combinations):
            yield f"exclude.{index}: {shown(entry)} given; no point has these values; mend or remove it"


def _point_problems(points: Sequence[Point]) -> Iterator[str]:
    first: dict[str, Point] = {}
    for point in points:
        held = first.setdefault(point.name.casefold(), point)
        if held is not point:
            yield (
                f"{point.name}: the name of two points ({shown(dict(held.overrides))} and "
                f"{shown(dict(point.overrides))}); give their values names of their own, or remove one of "
                "two equal seeds"
            )
        if len(point.name) > LONGEST_NAME:
            yield (
                f"{point.name}: a name of {len(point.name)} characters; allowed: {LONGEST_NAME}; give the "
                "values of the axis names: {name: {key: value}}"
            )


def _group_problems(sweep: SweepConfig, points: Sequence[Point]) -> Iterator[str]:
    axes = list(sweep.grid)
    for axis in sweep.group_by or ():
        if axis not in axes:
            near = nearest(axis, axes)
            remedy = f"did you mean {near}?" if near else "name one"
            yield f"group_by: {axis} given; allowed: axes of the grid ({', '.join(axes) or 'none'}); {remedy}"
    groups = list(dict.fromkeys(point.group for point in points))
    if sweep.baseline is not None and sweep.baseline not in groups:
        near = nearest(sweep.baseline, groups)
        remedy = f"did you mean {near}?" if near else "name one"
        yield (
            f"baseline: {sweep.baseline} given; allowed: a group of the sweep ({', '.join(groups) or 'none'})"
            f"; {remedy}"
        )
