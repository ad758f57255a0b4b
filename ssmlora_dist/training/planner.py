"""What a run takes on its devices, and which settings fit, from its configuration alone.

Bytes are those of `distributed.cost_model`, which tests hold against traced steps; time is the least that the
device's published peaks leave: nothing here has run. What is not in it: launches, which bind short
micro-batches, and links between nodes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ssmlora_dist.config.build import row_problems, shapes_of
from ssmlora_dist.config.schema import RunConfig, Spared
from ssmlora_dist.config.topology import data_parallel_size, topology_problems
from ssmlora_dist.distributed.cost_model import ModelCosts
from ssmlora_dist.distributed.partition import StageLoad, partition, size_text, stage_loads
from ssmlora_dist.training.topology import ModelSizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
# CUDA's context, libraries' work spaces and NCCL's buffers; and gaps between an allocator's blocks.
CONTEXT_BYTES, ALLOCATOR_SHARE = GIB, 0.05
TILE_SIZE = 4096
SPARING = (
    (None, 1, False),
    (TILE_SIZE, 1, False),
    (TILE_SIZE, 2, False),
    (TILE_SIZE, 4, False),
    (TILE_SIZE, 1, True),
    (TILE_SIZE, 2, True),
)
"""Tiles, layers a checkpoint and offload, by the time that they cost: what `auto` goes through."""
MOST_ROWS = 64
DEVICES_A_NODE = 8


class Device(NamedTuple):
    """A kind of GPU, by its data sheet.

    Attributes:
        name: of it.
        memory_gib: that it has.
        tflops: of dense products in bfloat16, TFLOP/s.
        bandwidth: of its memory, 1e9 bytes/s.
        link: to other GPUs of a node, 1e9 bytes/s in one direction.
        host_link: to host memory, likewise.
    """

    name: str
    memory_gib: float
    tflops: float
    bandwidth: float
    link: float
    host_link: float


DEVICES = (
    Device("GeForce RTX 4090", 24, 165, 1008, 32, 32),
    Device("L40S", 48, 362, 864, 32, 32),
    Device("H100 SXM", 80, 989, 3350, 450, 64),
    Device("H200 SXM", 141, 989, 4800, 450, 64),
    Device("B200", 192, 2250, 8000, 900, 64),
)


def device_of(memory_gib: float) -> Device:
    """The least of `DEVICES` with so much memory; the largest where none has it."""
    return next((device for device in DEVICES if device.memory_gib >= memory_gib), DEVICES[-1])


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank's device at most, by kind.

    Attributes:
        backbone: frozen weights; under ZeRO 3 its share and two layers whole.
        adapters: what is trained, with gradients.
        optimizer: its moments, or this rank's share.
        communication: buckets and copies of ZeRO; what shared rows are exchanged through.
        checkpoints: what is kept for the backward pass: inputs of layers, or activations.
        working: what one layer or the loss works with.
        reserve: `CONTEXT_BYTES`, and `ALLOCATOR_SHARE` of the device.
        host: in host memory; not part of `total`.
    """

    backbone: int
    adapters: int
    optimizer: int
    communication: int
    checkpoints: int
    working: int
    reserve: int
    host: int = 0

    @property
    def total(self) -> int:
        """All but `host`."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


@dataclass(frozen=True)
class Plan:
    """A configuration on devices.

    Attributes:
        config: of the run.
        memory: of the fullest rank.
        seconds: of a step at best.
        tokens: of a step, padding counted.
    """

    config: RunConfig
    memory: RankMemory
    seconds: float
    tokens: int


class Planner:
    """Plans of one model on one number of devices.

    Args:
        config: of the run; its model, quantisation and adapter are taken as given, and what is `auto` is
            decided, if the memory is known.
        num_devices: ranks, one on each device.
        memory_gib: of a device; 0: nothing is asked of whether it fits.
        host_memory_gib: of a node; None: not known, and enough.
        model: `meta_model` of the configuration, if at hand.
    """

    def __init__(
        self,
        config: RunConfig,
        num_devices: int,
        memory_gib: float = 0.0,
        host_memory_gib: float | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        self.config, self.num_devices, self.device = config, num_devices, device_of(memory_gib)
        self.memory_bytes = int(memory_gib * GIB)
        self.host_bytes = None if host_memory_gib is None else int(host_memory_gib * GIB)
        self.sizes, self.shapes = ModelSizes.of(config, model), shapes_of(config.model)
        self._asked: dict[int, list[str]] = {}
        self._splits: dict[tuple[int, str], tuple[int, ...]] = {}
        if memory_gib:
            reserve = CONTEXT_BYTES + int(ALLOCATOR_SHARE * self.memory_bytes)
            self.config, _ = self.settle(self.memory_bytes - reserve)

    def plan(self, config: RunConfig, num_tokens: int | None = None) -> Plan:
        """What a configuration takes, with rows of `data.max_length` or `num_tokens`, all supervised."""
        tokens = config.data.max_length if num_tokens is None else num_tokens
        parallel, replicas = config.parallel, data_parallel_size(config, self.num_devices)
        # What a rank has of a row; attention goes over all of it, for its share of the heads.
        own = -(-tokens // parallel.sequence_parallel)
        costs, held = (
            _recomputed_on_gradient(self.sizes.costs(config, replicas, each, each), config)
            for each in (tokens, own)
        )
        boundaries = parallel.stage_boundaries or self._split(costs, parallel.pipeline_stages)
        loads, held_loads = (stage_loads(each, boundaries) for each in (costs, held))
        memory = max(
            (self._memory(config, held, load, own) for load in held_loads), key=lambda one: one.total
        )
        slowest = max(loads, key=lambda load: load.flops)
        batch = config.training.global_batch_size
        return Plan(config, memory, self._seconds(config, costs, slowest), batch * tokens)

    def settle(self, memory_bytes: float) -> tuple[RunConfig, Plan | None]:
        """The configuration with what is `auto` decided, and its plan, if anything was.

        The first of what costs least time that holds no more than `memory_bytes`, or else what holds least.
        """
        if not self.config.training.is_unsettled:
            return self.config, None
        plans = []
        has_mlps = any(layer.mlp_weights for layer in self.sizes.shape.layers)
        for tile_size, number, offload in SPARING:
            given = _spared(number, offload, tile_size if has_mlps else None)
            undecided = {
                key: value
                for key, value in given.items()
                if getattr(self.config.training, key.partition(".")[2]) == "auto"
            }
            plans.append(self.plan(_with(self.config, undecided)))
            if plans[-1].memory.total - plans[-1].memory.reserve <= memory_bytes:
                return plans[-1].config, plans[-1]
        least = min(plans, key=lambda plan: plan.memory.total)
        return least.config, least

    def fits(self, plan: Plan) -> bool:
        """Whether device and host hold it."""
        on_host = plan.memory.host * min(self.num_devices, DEVICES_A_NODE)
        return plan.memory.total <= self.memory_bytes and (
            self.host_bytes is None or on_host <= self.host_bytes
        )

    def best(self) -> Plan | None:
        """The fastest plan that fits, of `candidates`; of equally fast ones the first; None: none fits."""
        fitting = [plan for config in self.candidates() if self.fits(plan := self.plan(config))]
        return min(fitting, key=lambda plan: plan.seconds, default=None)

    def longest(self, config: RunConfig) -> int:
        """Tokens of the longest row, one a micro-batch, that fits; in steps of 1,024."""
        single = _with(config, {"training.micro_batch_size": 1})
        fitting, too_long = 0, 1
        while too_long < 2**14 and self.fits(self.plan(single, too_long * 1024)):
            fitting, too_long = too_long, 2 * too_long
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            if self.fits(self.plan(single, middle * 1024)):
                fitting = middle
            else:
                too_long = middle
        return fitting * 1024

    def longest_rows(self, *, offload: bool) -> tuple[int, RunConfig]:
        """The longest row of any candidate on every device by itself, and its settings."""
        found = [
            (self.longest(config), config)
            for config in self.candidates()
            if config.training.offload_checkpoints == offload
            and config.training.gradient_checkpointing
            and config.training.micro_batch_size == 1
        ]
        return max(found, key=lambda pair: pair[0])

    def candidates(self) -> Iterator[RunConfig]:
        """Settings that keep to all rules; those that change least come first."""
        parallel = [
            {
                "parallel.pipeline_stages": stages,
                "parallel.sequence_parallel": ranks,
                "parallel.zero_stage": zero,
            }
            for zero, ranks, stages in itertools.product(
                (self._unsharded_stage(), 3), _divisors(self.num_devices), _divisors(self.num_devices)
            )
        ]
        recompute = [{"training.gradient_checkpointing": False, **_spared(1, False, None)}]
        recompute += [
            {"training.gradient_checkpointing": True, **_spared(number, offload, tile_size)}
            for offload, number, tile_size in itertools.product((False, True), (1, 2, 4), (None, TILE_SIZE))
        ]
        for one, other in itertools.product(parallel, recompute):
            stages = one["parallel.pipeline_stages"]
            if one["parallel.zero_stage"] == 3 and self.num_devices == 1:
                continue
            boundaries = self.config.parallel.stage_boundaries
            given: dict[str, Any] = {
                **one,
                **other,
                "parallel.stage_boundaries": boundaries if boundaries and len(boundaries) == stages else None,
            }
            if one["parallel.zero_stage"] != 3:
                given["parallel.offload_parameters"] = False
            config = _with(self.config, given | {"training.micro_batch_size": 1})
            if self._problems(config):
                continue
            share = config.training.global_batch_size // data_parallel_size(config, self.num_devices)
            sizes = (2**power for power in range(MOST_ROWS.bit_length()))
            yield from (
                _with(config, {"training.micro_batch_size": size}) for size in sizes if share % size == 0
            )

    def _unsharded_stage(self) -> int:
        stage = self.config.parallel.zero_stage
        return stage if stage < 3 else 0

    def _problems(self, config: RunConfig) -> list[str]:
        if config.parallel.pipeline_stages > self.sizes.shape.num_layers:
            return ["more stages than layers"]
        problems = topology_problems(config, world_size=self.num_devices, device_type="cuda")
        return problems or self._row_problems(config.parallel.sequence_parallel)

    def _row_problems(self, ranks: int) -> list[str]:
        """What keeps the run's rows from being shared among so many ranks; asked once."""
        if ranks not in self._asked:
            self._asked[ranks] = row_problems(
                _with(self.config, {"parallel.sequence_parallel": ranks}), self.shapes, "cuda"
            )
        return self._asked[ranks]

    def _split(self, costs: ModelCosts, num_stages: int) -> tuple[int, ...]:
        """Stages balanced by time, of which sizes of batches and tiles change next to nothing; found once."""
        key = num_stages, costs.recompute
        if key not in self._splits:
            self._splits[key] = partition(costs, num_stages)
        return self._splits[key]

    def _memory(self, config: RunConfig, costs: ModelCosts, load: StageLoad, tokens: int) -> RankMemory:
        parallel = config.parallel
        shards = self.num_devices // parallel.pipeline_stages
        # A parameter, its gradient and two moments: four times its bytes.
        trained = load.adapter_bytes // 4
        optimizer, communication, host, backbone = 2 * trained, 0, 0, load.frozen_bytes
        if parallel.zero_stage:
            # A flat copy of the share that is stepped, and a bucket for all gradients.
            communication = trained // shards + trained
            optimizer //= shards
        if parallel.offload_optimizer:
            optimizer, host = 0, host + optimizer
        if parallel.zero_stage == 3:
            share = backbone // shards
            if parallel.offload_parameters:
                share, host = 0, host + share
            backbone = share + 2 * max(layer.frozen_bytes for layer in costs.layers)
        if parallel.sequence_parallel > 1:
            # Of queries, keys, values and what attention gives, as they are and as they are exchanged.
            widest = max(layer.activation_size for layer in self.sizes.shape.layers)
            mlp = max(layer.mlp_activation_size for layer in self.sizes.shape.layers)
            width = max(0, widest - mlp - self.sizes.shape.hidden_size)
            communication += (
                2 * width * tokens * config.training.micro_batch_size * self.sizes.compute_dtype_bytes
            )
        if config.training.offload_checkpoints:
            host += sum(costs.layers[own.start].input_bytes for own in costs.checkpoints(load.layers))
        return RankMemory(
            backbone=backbone,
            adapters=2 * trained,
            optimizer=optimizer,
            communication=communication,
            checkpoints=load.kept_bytes,
            working=load.activation_bytes - load.kept_bytes,
            reserve=CONTEXT_BYTES + int(ALLOCATOR_SHARE * self.memory_bytes),
            host=host,
        )

    def _seconds(self, config: RunConfig, costs: ModelCosts, slowest: StageLoad) -> float:
        """Of a step: products, dequantisation and transfers of the slowest stage; and the bubble."""
        parallel, device = config.parallel, self.device
        ranks, stages = parallel.sequence_parallel, parallel.pipeline_stages
        compute = slowest.flops / ranks / (device.tflops * 1e12)
        layers = [costs.layers[index] for index in slowest.layers]
        frozen = sum(layer.frozen_bytes for layer in layers)
        # Forward, and backward with the recompute: packed weights are read, dequantised ones written.
        dequantized = sum(layer.dequantized_bytes for layer in layers)
        compute += 2 * (frozen + dequantized) / (device.bandwidth * 1e9) if dequantized else 0.0
        transfers = 0.0
        if config.training.offload_checkpoints:
            kept = sum(costs.layers[own.start].input_bytes for own in costs.checkpoints(slowest.layers))
            transfers = 2 * kept / ranks / (device.host_link * 1e9)
        if parallel.zero_stage == 3:
            source = device.host_link if parallel.offload_parameters else device.link
            passes = 3 if config.training.gradient_checkpointing else 2
            transfers = max(transfers, passes * frozen / (source * 1e9))
        if ranks > 1:
            # Queries, keys, values and attention's results, forward, again and backward.
            state = sum(layer.input_bytes for layer in layers) / ranks
            compute += 3 * 4 * state / (device.link * 1e9)
        each = max(compute, transfers)
        return each * (costs.num_micro_batches + stages - 1)


def changes(before: RunConfig, after: RunConfig) -> list[str]:
    """What differs between two configurations, as `--set` takes it."""
    found = []
    for section in ("training", "parallel"):
        old, new = (getattr(config, section).model_dump(mode="json") for config in (before, after))
        found += [f"{section}.{name}={json.dumps(new[name])}" for name in new if new[name] != old[name]]
    return found


def _with(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values of `section.field`; not checked."""
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        by_section.setdefault(section, {})[name] = value
    return config.model_copy(
        update={
            section: getattr(config, section).model_copy(update=update)
            for section, update in by_section.items()
        }
    )


def _spared(layers_per_checkpoint: int, offload: bool, tile_size: int | None) -> dict[str, Any]:
    return {
        "training.layers_per_checkpoint": layers_per_checkpoint,
        "training.offload_checkpoints": offload,
        "training.mlp_tile_size": tile_size,
    }


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _recomputed_on_gradient(costs: ModelCosts, config: RunConfig) -> ModelCosts:
    """Without what a stage may recompute ahead, unless a number of layers is asked for."""
    is_given = config.parallel.pipeline_stages > 1 and config.parallel.recompute_ahead != "auto"
    return costs if is_given or costs.recompute == "none" else replace(costs, layers_ahead=0)


def estimate_text(planner: Planner) -> tuple[str, bool]:
    """What a run takes as configured, and with the best settings; and whether any of them fit."""
    config, device = planner.config, planner.device
    as_configured, best = planner.plan(config), planner.best()
    plans = {"as configured": as_configured}
    if best is not None and changes(config, best.config):
        plans["proposed"] = best
    rows = [["GiB of the fullest rank", *plans]]
    for field in fields(RankMemory):
        sizes = [getattr(plan.memory, field.name) for plan in plans.values()]
        if field.name == "host":
            rows.append(["in all", *(_gib(plan.memory.total) for plan in plans.values())])
        if any(sizes):
            rows.append([_KINDS[field.name], *map(_gib, sizes)])
    rows.append(["fits", *("yes" if planner.fits(plan) else "no" for plan in plans.values())])
    rows.append(["seconds a step, at best", *(f"{plan.seconds:.2f}" for plan in plans.values())])
    rows.append(["tokens/s, at best", *(f"{plan.tokens / plan.seconds:,.0f}" for plan in plans.values())])
    rows.append(["longest row that fits", *(f"{planner.longest(plan.config):,}" for plan in plans.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{planner.num_devices} x {planner.memory_bytes / GIB:g} GiB, rows of {config.data.max_length:,} "
        f"tokens, all supervised; time by the published peaks of {device.name}, which no run reaches; "
        "not measured",
        "",
        *(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
            for row in rows
        ),
        "",
    ]
    if best is None:
        lines.append(
            "nothing fits: shorten data.max_length, quantise to nf4, or use more or larger devices; "
            "parallel.offload_parameters with parallel.zero_stage 3 keeps the backbone in host memory"
        )
    elif "proposed" in plans:
        lines.append("--set " + " ".join(changes(config, best.config)))
    else:
        lines.append("no other settings are faster: keep these")
    return "\n".join(lines), best is not None


def settle_memory(config: RunConfig, world_size: int, memory_bytes: float) -> tuple[RunConfig, str]:
    """The configuration with what spares memory decided where it is `auto`, and a line that says so.

    Args:
        config: of the run.
        world_size: number of ranks.
        memory_bytes: that a rank may be planned to hold.
    """
    settled, plan = Planner(config, world_size).settle(memory_bytes)
    assert plan is not None, "nothing is auto"
    names = [name for name in Spared._fields if getattr(config.training, name) == "auto"]
    chosen = ", ".join(f"training.{name} {json.dumps(getattr(settled.training, name))}" for name in names)
    planned = plan.memory.total - plan.memory.reserve
    fits = "" if planned <= memory_bytes else "; that is too much, and nothing takes less"
    return settled, (
        f"{chosen} (auto: {size_text(planned)} planned where {size_text(memory_bytes)} may be held{fits})"
    )


def planned_text(config: RunConfig, world_size: int, model: PreTrainedModel | None = None) -> str:
    """What the fullest rank of a run is planned to hold, by kind; without CUDA's context and gaps."""
    memory = Planner(config, world_size, model=model).plan(config).memory
    kinds = {name: getattr(memory, name) for name in _KINDS if name not in ("reserve", "host")}
    parts = [f"{_KINDS[name]} {size_text(size)}" for name, size in kinds.items() if size]
    host = f"; in host memory {size_text(memory.host)}" if memory.host else ""
    return (
        f"{size_text(memory.total - memory.reserve)} a rank, for rows of {config.data.max_length:,} tokens "
        f"({', '.join(parts)}{host})"
    )


_KINDS = {
    "backbone": "frozen backbone",
    "adapters": "adapters and their gradients",
    "optimizer": "optimiser",
    "communication": "communication",
    "checkpoints": "kept for the backward pass",
    "working": "one layer, or the loss",
    "reserve": "CUDA's context and gaps",
    "host": "in host memory",
}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
