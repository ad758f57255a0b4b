"""Cases set against each other: differences to a baseline, curves by length, efficiency by topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

from ssmlora_dist.sweep.cases import (
    NOT_SETTINGS,
    UNSET,
    Case,
    Measured,
    Setting,
    Sweep,
    measure,
    natural,
    part_of,
    setting_of,
    text_of,
)

TOPOLOGY_PREFIXES = ("parallel.", "launcher.")
# Go along with the topology where the work of a device is held fixed.
BATCH_KEYS = ("training.global_batch_size", "training.micro_batch_size")

Key = TypeVar("Key")
Cells = Mapping[Key, Measured]


@dataclass(frozen=True)
class Difference:
    """A case against the baseline's of the same setting, seed by seed.

    Attributes:
        case: what is compared.
        reference: the baseline's case; None where it has none of this setting.
        num_pairs: seeds that finished in both.
        metrics: metric to the mean of case minus baseline, over the seeds that finished in both.
    """

    case: Case
    reference: Case | None
    num_pairs: int
    metrics: Mapping[str, Measured]


@dataclass(frozen=True)
class LengthRow(Generic[Key]):
    """One line of a table by length: a case, or several that differ in their length alone.

    Attributes:
        group, setting: what the cases have in common.
        cases: of the line.
        cells: length, or length and depth, to what was measured there.
    """

    group: str
    setting: Setting
    cases: tuple[Case, ...]
    cells: Mapping[Key, Measured]


@dataclass(frozen=True)
class Efficiency:
    """A workload on a topology.

    Attributes:
        workload: its name.
        topology: how it was spread, as the overridden settings say.
        case: the points.
        num_devices: that it ran on; None if no point finished.
        relative: tokens per second and device over the reference's, seed by seed; None without both.
        is_reference: whether it is the smallest topology of its workload that finished.
    """

    workload: str
    topology: str
    case: Case
    num_devices: int | None
    relative: Measured | None
    is_reference: bool


def differences(sweep: Sweep) -> list[Difference]:
    """Every case that is not the baseline's against the baseline; none where no baseline is named.

    A seed counts where both cases finished with it; the difference of one pair has no interval.
    """
    if sweep.baseline is None:
        return []
    references = {case.setting: case for case in sweep.cases if case.group == sweep.baseline}
    found = []
    for case in sweep.cases:
        if case.group == sweep.baseline:
            continue
        reference = references.get(case.setting)
        if reference is None:
            found.append(Difference(case, None, 0, {}))
            continue
        metrics = {}
        for name in sweep.metrics:
            own, other = case.by_seed(name), reference.by_seed(name)
            pairs = [own[seed] - other[seed] for seed in own if seed in other]
            mean = measure(pairs, is_score=False)
            if mean is not None:
                metrics[name] = mean
        found.append(Difference(case, reference, len(case.seeds & reference.seeds), metrics))
    return found


def by_training_length(sweep: Sweep, metric: str) -> list[LengthRow[int | None]]:
    """A metric over all inputs by the length they were trained at; None: that of the base configuration."""

    def cells(case: Case) -> Cells[int | None]:
        found = case.measure(metric)
        return {} if found is None else {case.length: found}

    return _rows(sweep, cells)


def by_input_length(sweep: Sweep, name: str) -> list[LengthRow[int]]:
    """A loss or score by the length of its inputs."""

    def cells(case: Case) -> Cells[int]:
        return {
            length: found
            for length, depth, metric in _parts(case, name)
            if depth is None and (found := case.measure(metric)) is not None
        }

    return _rows(sweep, cells)


def by_depth(sweep: Sweep, name: str) -> list[LengthRow[tuple[int, float]]]:
    """A score by the length of its inputs and the depth of the fact in them."""

    def cells(case: Case) -> Cells[tuple[int, float]]:
        return {
            (length, depth): found
            for length, depth, metric in _parts(case, name)
            if depth is not None and (found := case.measure(metric)) is not None
        }

    return _rows(sweep, cells)


def efficiencies(sweep: Sweep) -> list[Efficiency]:
    """Tokens per second and device, relative to the smallest topology that runs the same workload.

    A workload is a group and all that its points override apart from topology and batch sizes. Empty where
    nothing of the topology differs between points.
    """
    keys = sorted({key for point in sweep.points for key in point.overrides})
    varying = [key for key in keys if len({text_of(p.overrides, key) for p in sweep.points}) > 1]
    spread = [key for key in varying if key.startswith(TOPOLOGY_PREFIXES)]
    devices = {id(case): _num_devices(case) for case in sweep.cases}
    if not spread and len({count for count in devices.values() if count is not None}) < 2:
        return []
    spread += [key for key in varying if key in BATCH_KEYS]
    topologies = {id(case): _topology_label(case, spread) for case in sweep.cases}
    # Where each group has a topology of its own, that is what the groups are.
    spans_groups = len({(case.group, topologies[id(case)]) for case in sweep.cases}) == len(
        {case.group for case in sweep.cases}
    )
    rest = [key for key in keys if key not in spread and key not in NOT_SETTINGS]
    workloads: dict[tuple[str, Setting], list[Case]] = {}
    for case in sweep.cases:
        setting = setting_of(case.points[0], rest)
        workloads.setdefault(("all groups" if spans_groups else case.group, setting), []).append(case)
    found = []
    for (group, setting), cases in workloads.items():
        label = label_of(group, sweep.shown_setting(setting))
        cases = sorted(cases, key=lambda case: (devices[id(case)] or 0, natural(topologies[id(case)])))
        reference = next((case for case in cases if devices[id(case)] is not None), None)
        for case in cases:
            relative = _relative(case, reference) if reference is not None else None
            topology = topologies[id(case)]
            found.append(Efficiency(label, topology, case, devices[id(case)], relative, case is reference))
    return found


def label_of(group: str, setting: Setting) -> str:
    """A line of a legend: the group, and what of the setting is not the base configuration's."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in setting if value != UNSET]
    return ", ".join([group, *parts])


def _parts(case: Case, name: str) -> list[tuple[int, float | None, str]]:
    """Length, depth if any, and full name of a metric's parts, in ascending order."""
    parts = [part_of(metric) for metric in case.metrics]
    own = [
        (part.length, part.depth, part.metric)
        for part in parts
        if part.name == name and part.length is not None
    ]
    return sorted(own, key=lambda part: (part[0], -1.0 if part[1] is None else part[1], part[2]))


def _rows(sweep: Sweep, cells_of: Callable[[Case], Cells[Key]]) -> list[LengthRow[Key]]:
    """A row for cases that differ in their length alone; where two have the same cell, for each of them."""
    families: dict[tuple[str, Setting], list[Case]] = {}
    for case in sweep.cases:
        rest = tuple((key, value) for key, value in case.setting if key not in sweep.length_keys)
        families.setdefault((case.group, rest), []).append(case)
    rows: list[LengthRow[Key]] = []
    for (group, rest), cases in families.items():
        cells = [cells_of(case) for case in cases]
        merged = {key: value for one in cells for key, value in one.items()}
        if len(merged) == sum(map(len, cells)):
            rows.append(LengthRow(group, rest, tuple(cases), merged))
        else:
            rows += [
                LengthRow(group, case.setting, (case,), own) for case, own in zip(cases, cells, strict=True)
            ]
    return rows


def _num_devices(case: Case) -> int | None:
    ranks = case.by_seed("num_ranks")
    if ranks:
        return round(median(ranks.values()))
    total, each = case.by_seed("tokens_per_second"), case.by_seed("tokens_per_second_per_device")
    ratios = [total[seed] / each[seed] for seed in total if each.get(seed)]
    return round(median(ratios)) if ratios else None


def _relative(case: Case, reference: Case) -> Measured | None:
    own, other = (one.by_seed("tokens_per_second_per_device") for one in (case, reference))
    ratios = [own[seed] / other[seed] for seed in own if other.get(seed)]
    return measure(ratios, is_score=False)


def _topology_label(case: Case, keys: Sequence[str]) -> str:
    overrides = case.points[0].overrides
    parts = [f"{key.rpartition('.')[2]}={text_of(overrides, key)}" for key in keys if key in overrides]
    return ", ".join(parts) or UNSET
