"""Where a rank stands in a topology, and how the layers of a model are split over stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.config.build import meta_model
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import Dataset, DatasetReport, Example
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.distributed.ds_config import deepspeed_config
from ssmlora_dist.distributed.loading import swap_rows
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.training import topology
from ssmlora_dist.training.topology import ParallelDims, build_engine, parallel_dims_of, plan_stages

from ..launch.processes import DEBUG_TINY

EXAMPLE = Example.from_tokens(range(1, 21), [False] * 12 + [True] * 8, None, {"length": 20})
DATA = Dataset([EXAMPLE], DatasetReport(1, 1))


def config_with(*overrides: str, ranks: int) -> RunConfig:
    return load_config(DEBUG_TINY, overrides, world_size=ranks, device_type="cpu")


@pytest.mark.parametrize(("stages", "ranks"), [(1, 4), (2, 4), (4, 4), (3, 6)])
def test_ranks_count_through_a_stage_first(stages: int, ranks: int) -> None:
    config = config_with(f"parallel.pipeline_stages={stages}", ranks=ranks)
    dims = [
        parallel_dims_of(config, DistributedContext(r, ranks, r, torch.device("cpu"))) for r in range(ranks)
    ]
    size = ranks // stages
    assert dims == [ParallelDims(rank % size, size, rank // size, stages) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("stages", "ranks", "opposite"),
    [
        (1, 2, [None, None]),
        (2, 2, [1, 0]),
        (2, 4, [2, 3, 0, 1]),
        (3, 3, [2, None, 0]),
        (3, 6, [4, 5, None, None, 0, 1]),
    ],
)
def test_the_ends_of_each_pipeline_swap_halves_of_a_table(
    stages: int, ranks: int, opposite: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(f"parallel.pipeline_stages={stages}", ranks=ranks)
    for rank, peer in enumerate(opposite):
        handed_over = handed_to_the_loader(config, rank, ranks, monkeypatch)
        swap = handed_over["swap_rows"]
        assert (swap and (swap.func, swap.args)) == (None if peer is None else (swap_rows, (peer,)))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_only_zero_3_takes_part_after_part(zero_stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(f"parallel.zero_stage={zero_stage}", ranks=2)
    on_part = handed_to_the_loader(config, 0, 2, monkeypatch)["on_part"]
    assert (on_part is not None) == (zero_stage == 3)


@pytest.mark.parametrize("saved", [(), ('adapter.modules_to_save=["norm"]',)])
def test_zero_s_buckets_are_as_large_as_what_is_trained(
    saved: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def watched(**settings: Any) -> dict[str, Any]:
        made.append(deepspeed_config(**settings))
        return made[-1]

    monkeypatch.setattr(topology, "deepspeed_config", watched)
    config = config_with("parallel.zero_stage=2", *saved, ranks=2)
    handed_to_the_loader(config, 0, 2, monkeypatch)
    trained = sum(parameter.numel() for parameter in adapter_parameters(meta_model(config)).values())
    assert 0 < trained < 10**5
    assert made[0]["zero_optimization"]["reduce_bucket_size"] == trained


class Stopped(Exception):
    """Loading was about to begin."""


def handed_to_the_loader(
    config: RunConfig, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The keywords with which a rank's part of the backbone would be loaded."""
    handed_over: dict[str, Any] = {}

    def build_model(*arguments: Any, **keywords: Any) -> None:
        handed_over.update(keywords)
        raise Stopped

    monkeypatch.setattr(topology, "build_model", build_model)
    context = DistributedContext(rank, ranks, rank, torch.device("cpu"))
    dims = parallel_dims_of(config, context)
    plan = plan_stages(config, DATA, dims) if dims.num_stages > 1 else None
    with pytest.raises(Stopped):
        build_engine(config, context, dims, plan)
    return handed_over


def test_every_layer_is_on_one_stage() -> None:
    config = config_with("parallel.pipeline_stages=3", ranks=3)
    plan = plan_stages(config, DATA, ParallelDims(0, 1, 0, 3))
    assert len(plan.layers) == 3
    assert [layer for layers in plan.layers for layer in layers] == list(range(6))
    assert "norm, head and loss" in plan.table


def test_every_stage_has_something_to_train() -> None:
    layers = "adapter.layers=-2:"
    config = config_with("parallel.pipeline_stages=2", layers, "parallel.stage_boundaries=[0,5]", ranks=2)
    assert plan_stages(config, DATA, ParallelDims(0, 1, 0, 2)).layers == (range(5), range(5, 6))
    config = config_with("parallel.pipeline_stages=2", layers, "parallel.stage_boundaries=[0,4]", ranks=2)
    with pytest.raises(ConfigError, match=r"stage 0 \(layers 0 to 3\) has no adapter to train; .*boundaries"):
        plan_stages(config, DATA, ParallelDims(0, 1, 0, 2))


def test_modules_that_are_trained_whole_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []

    def model_costs(*arguments: Any, **keywords: Any) -> Any:
        counted.append(costs_of(*arguments, **keywords))
        return counted[-1]

    costs_of = topology.model_costs
    monkeypatch.setattr(topology, "model_costs", model_costs)
    names = 'adapter.modules_to_save=["embed_tokens","input_layernorm","norm","lm_head"]'
    for overrides in ((), (names,)):
        config = config_with("parallel.pipeline_stages=2", *overrides, ranks=2)
        plan_stages(config, DATA, ParallelDims(0, 1, 0, 2))
    without, costs = counted[0], counted[-1]
    shapes = config.model.config or {}
    hidden, table = shapes["hidden_size"], shapes["vocab_size"] * shapes["hidden_size"]
    assert costs.embedding.adapter_bytes == 16 * table
    assert costs.head.adapter_bytes == 16 * (hidden + table)
    for layer, plain in zip(costs.layers, without.layers, strict=True):
        assert layer.adapter_bytes == plain.adapter_bytes + 16 * hidden


def test_boundaries_are_taken_as_they_are_given() -> None:
    config = config_with("parallel.pipeline_stages=2", "parallel.stage_boundaries=[0,5]", ranks=2)
    assert plan_stages(config, DATA, ParallelDims(0, 1, 0, 2)).layers == (range(0, 5), range(5, 6))


@pytest.mark.parametrize(
    ("asked", "checkpointing", "memory_gib", "expected"),
    [
        ("auto", "true", math.inf, 5),
        ("auto", "true", 0.0, 0),
        ("3", "true", math.inf, 3),
        ("3", "true", 0.0, 3),
        ("0", "true", math.inf, 0),
        ("auto", "false", math.inf, 0),
    ],
)
def test_layers_recomputed_ahead(asked: str, checkpointing: str, memory_gib: float, expected: int) -> None:
    config = config_with(
        "parallel.pipeline_stages=2",
        "parallel.stage_boundaries=[0,5]",
        f"parallel.recompute_ahead={asked}",
        f"training.gradient_checkpointing={checkpointing}",
        ranks=2,
    )
    plan = plan_stages(config, DATA, ParallelDims(0, 1, 0, 2), memory_gib * 2**30)
    assert plan.layers_ahead == expected
    assert plan.table.splitlines()[1].split("layers 0-4")[1].split()[:2] == ["5", str(expected)]


@pytest.mark.parametrize(
    ("stages", "boundaries", "says"),
    [
        (7, "null", "parallel.pipeline_stages: 7 given; allowed: 1 to 6"),
        (2, "[1,3]", "parallel.stage_boundaries"),
        (2, "[0,0]", "parallel.stage_boundaries"),
        (3, "[0,4,2]", "parallel.stage_boundaries"),
        (2, "[0,6]", "parallel.stage_boundaries"),
    ],
)
def test_impossible_splits_are_refused(stages: int, boundaries: str, says: str) -> None:
    config = config_with(
        f"parallel.pipeline_stages={stages}",
        f"parallel.stage_boundaries={boundaries}",
        f"training.global_batch_size={stages * 24}",
        ranks=stages,
    )
    with pytest.raises(ConfigError) as refused:
        plan_stages(config, DATA, ParallelDims(0, 1, 0, stages))
    assert says in str(refused.value)
