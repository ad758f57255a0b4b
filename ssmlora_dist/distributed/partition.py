"""Which pipeline stage holds which decoder layers, balanced by what they cost or as the user says.

A split is a tuple of boundaries, the first layer of every stage: `(0, 8, 15, 22)`. The embedding belongs to
stage 0; final norm, output head and loss to the last stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

from ssmlora_dist.distributed.cost_model import ModelCosts, PartCost
from ssmlora_dist.distributed.schedule import micro_batches_in_flight
from ssmlora_dist.errors import ConfigError

STAGES_FIELD = "parallel.pipeline_stages"
BOUNDARIES_FIELD = "parallel.stage_boundaries"


@dataclass(frozen=True)
class StageLoad:
    """What one stage computes per micro-batch, and what it holds.

    Attributes:
        layers: indices of its decoder layers.
        num_ahead: how many of them, the last ones, are recomputed while the stage waits or, on the last
            stage, not at all.
        forward_flops, recompute_flops, backward_flops: per micro-batch, as the stage runs them: without the
            recompute where it is spared.
        frozen_bytes: weights of the backbone.
        adapter_bytes: adapters with their gradients and moments.
        activation_bytes: at most, of all micro-batches in flight.
        kept_bytes: of these, what waits for the backward pass: checkpoints, or activations.
    """

    layers: range
    num_ahead: int
    forward_flops: int
    recompute_flops: int
    backward_flops: int
    frozen_bytes: int
    adapter_bytes: int
    activation_bytes: int
    kept_bytes: int

    @property
    def flops(self) -> int:
        """FLOPs per micro-batch, which stand for the stage's time."""
        return self.forward_flops + self.recompute_flops + self.backward_flops

    @property
    def memory_bytes(self) -> int:
        """All that the stage holds, at most."""
        return self.frozen_bytes + self.adapter_bytes + self.activation_bytes


def stage_layers(boundaries: Sequence[int], num_layers: int) -> tuple[range, ...]:
    """The layers of every stage: `(0, 4)` of 6 layers -> `(range(0, 4), range(4, 6))`."""
    return tuple(map(range, boundaries, [*boundaries[1:], num_layers]))


def stage_count_problems(num_stages: int, num_layers: int) -> list[str]:
    """What is wrong with the number of stages for a model of `num_layers` decoder layers; a line or none."""
    if 1 <= num_stages <= num_layers:
        return []
    return [
        f"{STAGES_FIELD}: {num_stages} given; allowed: 1 to {num_layers}, the number of the model's decoder "
        f"layers, as every stage holds at least one; set it to {num_layers} or less"
    ]


def boundary_problems(boundaries: Sequence[int], *, num_layers: int, num_stages: int) -> list[str]:
    """What is wrong with explicit boundaries, one line for each mistake.

    Args:
        boundaries: the first layer of every stage, counted from 0.
        num_layers: of the model.
        num_stages: in the configuration.
    """
    if wrong_count := stage_count_problems(num_stages, num_layers):
        return wrong_count
    found, outside = [], [first for first in boundaries if not 0 <= first < num_layers]
    if len(boundaries) != num_stages:
        found.append(f"{len(boundaries)} first layers for {num_stages} stages ({STAGES_FIELD})")
    if outside:
        found.append(f"{', '.join(map(str, outside))} out of range: the layers are 0 to {num_layers - 1}")
    if boundaries and 0 < boundaries[0] < num_layers:
        found.append(f"{_named(range(boundaries[0]))} skipped: stage 0 begins at layer {boundaries[0]}")
    for stage, (first, following) in enumerate(pairwise(boundaries)):
        if first in outside or following in outside:
            continue
        if following == first:
            found.append(f"stage {stage} empty: stages {stage} and {stage + 1} begin at layer {first}")
        elif following < first:
            begins = f"stage {stage + 1} begins at layer {following}, stage {stage} at layer {first}"
            found.append(f"{_named(range(following, first))} repeated: {begins}")
    even = [stage * num_layers // num_stages for stage in range(num_stages)]
    return [
        f"{BOUNDARIES_FIELD}: {list(boundaries)} given; {problem}; write the first layer of each stage, "
        f"increasing from 0, such as {even}, or leave it out to balance the stages by cost"
        for problem in found
    ]


def check_boundaries(boundaries: Sequence[int], *, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Explicit boundaries, as a split.

    Args:
        boundaries: the first layer of every stage, counted from 0.
        num_layers: of the model.
        num_stages: in the configuration.

    Raises:
        ConfigError: they are no split of the model; a line for each mistake.
    """
    problems = boundary_problems(boundaries, num_layers=num_layers, num_stages=num_stages)
    if problems:
        raise ConfigError(problems)
    return tuple(boundaries)


def partition(costs: ModelCosts, num_stages: int, *, memory_limit_bytes: float = math.inf) -> tuple[int, ...]:
    """The split whose slowest stage is fastest.

    Among equally fast ones that whose fullest stage holds least; among those the one whose boundaries are
    lowest, compared from stage 0 on.

    Args:
        costs: of the model's parts.
        num_stages: p.
        memory_limit_bytes: what a stage may hold at most.

    Raises:
        ConfigError: there are more stages than layers, or no split keeps to the limit.
    """
    num_layers = len(costs.layers)
    if problems := stage_count_problems(num_stages, num_layers):
        raise ConfigError(problems)
    load = _Loads(costs, num_stages).load

    def memory(stage: int, layers: range) -> float:
        return load(stage, layers).memory_bytes

    def time(stage: int, layers: range) -> float:
        return load(stage, layers).flops if memory(stage, layers) <= memory_limit_bytes else math.inf

    slowest, _ = _smallest_maximum(time, num_layers, num_stages)
    if slowest == math.inf:
        least, _ = _smallest_maximum(memory, num_layers, num_stages)
        problem = (
            f"{STAGES_FIELD}: {num_stages} given, {size_text(memory_limit_bytes)} for each stage; every "
            f"split of {num_layers} layers has a stage of at least {size_text(least)}; use more stages, "
            "shorter sequences or a smaller micro-batch"
        )
        raise ConfigError([problem])

    def memory_if_fast(stage: int, layers: range) -> float:
        return memory(stage, layers) if time(stage, layers) <= slowest else math.inf

    return _smallest_maximum(memory_if_fast, num_layers, num_stages)[1]


def most_layers_ahead(costs: ModelCosts, boundaries: Sequence[int], memory_limit_bytes: float) -> int:
    """The largest `ModelCosts.layers_ahead` with which no stage of a split holds more than the limit.

    0 where none is small enough: then memory is not what it decides.
    """
    most = max(map(len, stage_layers(boundaries, len(costs.layers))))
    fitting = (
        number
        for number in range(most, 0, -1)
        if all(
            load.memory_bytes <= memory_limit_bytes
            for load in stage_loads(replace(costs, layers_ahead=number), boundaries)
        )
    )
    return next(fitting, 0)


def stage_loads(costs: ModelCosts, boundaries: Sequence[int]) -> tuple[StageLoad, ...]:
    """What each stage of a split computes and holds."""
    loads = _Loads(costs, len(boundaries))
    return tuple(map(loads.load, range(len(boundaries)), stage_layers(boundaries, len(costs.layers))))


def stage_table(costs: ModelCosts, boundaries: Sequence[int]) -> str:
    """What each stage of a split holds, and its share of the time, as text with one line for each."""
    loads = stage_loads(costs, boundaries)
    rows = [["stage", "holds", "layers", "ahead", "backbone", "adapters", "activations", "memory", "time"]]
    whole = sum(load.flops for load in loads)
    for stage, load in enumerate(loads):
        holds = ["embedding"] * (stage == 0) + [_named(load.layers)]
        holds += ["norm, head and loss"] * (stage == len(loads) - 1)
        sizes = (load.frozen_bytes, load.adapter_bytes, load.activation_bytes, load.memory_bytes)
        share = f"{load.flops / whole:.1%}"
        counts = [str(len(load.layers)), str(load.num_ahead)]
        rows.append([str(stage), ", ".join(holds), *counts, *map(size_text, sizes), share])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[1] = row[1].ljust(widths[1])
        lines.append("  ".join(cells))
    ratio = max(load.flops for load in loads) * len(loads) / whole
    return "\n".join([*lines, f"slowest stage: {ratio:.3f} x the mean"])


class _Loads:
    """The load of any run of layers at any stage, in constant time for the sums."""

    def __init__(self, costs: ModelCosts, num_stages: int) -> None:
        self.costs, self.num_stages = costs, num_stages
        self.sums = {
            field.name: list(accumulate((getattr(layer, field.name) for layer in costs.layers), initial=0))
            for field in fields(PartCost)
        }
        self.load = functools.cache(self._load)

    def _load(self, stage: int, layers: range) -> StageLoad:
        costs, is_last = self.costs, stage == self.num_stages - 1
        ends: list[PartCost] = [costs.embedding] * (stage == 0) + [costs.head] * is_last
        total = {
            name: self._sum(name, layers) + sum(getattr(part, name) for part in ends) for name in self.sums
        }
        ahead = costs.ahead(layers)
        spared = total["recompute_flops"] if costs.recompute == "none" else 0
        if is_last:
            spared += self._sum("recompute_flops", ahead)
        in_flight = micro_batches_in_flight(stage, self.num_stages, costs.num_micro_batches)
        kept_bytes = in_flight * self._kept_bytes(layers, ends)
        return StageLoad(
            layers=layers,
            num_ahead=len(ahead),
            forward_flops=total["forward_flops"],
            recompute_flops=total["recompute_flops"] - spared,
            backward_flops=total["backward_flops"],
            frozen_bytes=total["frozen_bytes"] - (costs.shared_bytes if len(ends) == 2 else 0),
            adapter_bytes=total["adapter_bytes"],
            activation_bytes=kept_bytes + self._rebuilt_bytes(layers, ends),
            kept_bytes=kept_bytes,
        )

    def _kept_bytes(self, layers: range, ends: Sequence[PartCost]) -> int:
        """What a stage keeps of one micro-batch until its backward pass."""
        costs = self.costs
        if costs.recompute == "none":
            return self._sum("saved_bytes", layers)
        # Of the layers ahead the first one's input alone.
        kept = [costs.layers[layer] for layer in costs.ahead(layers)[:1]] or ends
        if not costs.offload_checkpoints:
            kept = [*kept, *(costs.layers[layers.start] for layers in costs.checkpoints(layers))]
        return sum(part.input_bytes for part in kept)

    def _rebuilt_bytes(self, layers: range, ends: Sequence[PartCost]) -> int:
        """What it works with for one, at most: its head, the layers ahead, then those of each checkpoint."""
        costs = self.costs
        if costs.recompute == "none":
            return max([self._working(layers), *(part.saved_bytes for part in ends)])
        ahead, of_ends = costs.ahead(layers), [part.saved_bytes for part in ends]
        alone = [
            self._sum("saved_bytes", own)
            + self._working(own)
            + self._sum("dequantized_bytes", own)
            # What has come back from host memory, and what comes back meanwhile.
            + (2 * costs.layers[own.start].input_bytes if costs.offload_checkpoints else 0)
            for own in costs.checkpoints(layers)
        ]
        if not ahead:
            return max([*alone, *of_ends])
        return max([self._sum("saved_bytes", ahead) + max(self._working(ahead), *of_ends, 0), *alone])

    def _working(self, layers: range) -> int:
        return max((self.costs.layers[layer].working_bytes for layer in layers), default=0)

    def _sum(self, name: str, layers: range) -> int:
        return self.sums[name][layers.stop] - self.sums[name][layers.start]


def _smallest_maximum(
    value: Callable[[int, range], float], num_layers: int, num_stages: int
) -> tuple[float, tuple[int, ...]]:
    """The least possible maximum of `value(stage, layers)` over a split, and the lowest boundaries for it."""
    # By stage: the least maximum from this stage to the last, by the layer at which this stage begins.
    best: list[dict[int, float]] = [{} for _ in range(num_stages)] + [{num_layers: -math.inf}]

    def maxima(stage: int, first: int) -> dict[int, float]:
        """The least maximum from `stage` on, by the layer at which the next stage begins."""
        following = best[stage + 1].items()
        return {stop: max(value(stage, range(first, stop)), rest) for stop, rest in following if stop > first}

    for stage in reversed(range(num_stages)):
        firsts = range(stage, num_layers - (num_stages - 1 - stage)) if stage else range(1)
        best[stage] = {first: min(maxima(stage, first).values()) for first in firsts}
    least = best[0][0]
    boundaries = [0]
    for stage in range(num_stages - 1):
        boundaries.append(min(stop for stop, most in maxima(stage, boundaries[-1]).items() if most <= least))
    return least, tuple(boundaries)


def _named(layers: range) -> str:
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start}-{layers.stop - 1}"


def size_text(num_bytes: float) -> str:
    """`5.31 GiB`, or in the unit below."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1024:.2f} KiB"
