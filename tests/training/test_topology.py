"""Where a rank stands in a topology, and how the layers of a model are split over stages."""

from __future__ import annotations

import math

import pytest
import torch

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import Dataset, DatasetReport, Example
from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.training.topology import Place, place_of, plan_stages

from ..launch.processes import DEBUG_TINY

EXAMPLE = Example.from_tokens(range(1, 21), [False] * 12 + [True] * 8, None, {"length": 20})
DATA = Dataset([EXAMPLE], DatasetReport(1, 1))


def config_with(*overrides: str, ranks: int) -> RunConfig:
    return load_config(DEBUG_TINY, overrides, world_size=ranks, device_type="cpu")


@pytest.mark.parametrize(("stages", "ranks"), [(1, 4), (2, 4), (4, 4), (3, 6)])
def test_ranks_count_through_a_stage_first(stages: int, ranks: int) -> None:
    config = config_with(f"parallel.pipeline_stages={stages}", ranks=ranks)
    places = [place_of(config, ProcessGroup(r, ranks, r, torch.device("cpu"))) for r in range(ranks)]
    size = ranks // stages
    assert places == [Place(rank % size, size, rank // size, stages) for rank in range(ranks)]


def test_every_layer_is_on_one_stage() -> None:
    config = config_with("parallel.pipeline_stages=3", ranks=3)
    plan = plan_stages(config, DATA, Place(0, 1, 0, 3))
    assert len(plan.layers) == 3
    assert [layer for layers in plan.layers for layer in layers] == list(range(6))
    assert "norm, head and loss" in plan.table


def test_boundaries_are_taken_as_they_are_given() -> None:
    config = config_with("parallel.pipeline_stages=2", "parallel.stage_boundaries=[0,5]", ranks=2)
    assert plan_stages(config, DATA, Place(0, 1, 0, 2)).layers == (range(0, 5), range(5, 6))


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
    plan = plan_stages(config, DATA, Place(0, 1, 0, 2), memory_gib * 2**30)
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
        plan_stages(config, DATA, Place(0, 1, 0, stages))
    assert says in str(refused.value)
