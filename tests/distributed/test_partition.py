from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

import pytest

from ssmlora_dist.distributed.cost_model import ModelCosts, PartCost
from ssmlora_dist.distributed.partition import (
    boundary_problems,
    check_boundaries,
    most_layers_ahead,
    partition,
    stage_count_problems,
    stage_layers,
    stage_loads,
    stage_table,
)
from ssmlora_dist.distributed.schedule import Recompute
from ssmlora_dist.errors import ConfigError

SEED = 20250307
RECOMPUTES: tuple[Recompute, ...] = ("none", "on_gradient", "while_waiting")
NOTHING = PartCost(0, 0, 0, 0, 0, 0, 0)


def random_part(source: random.Random) -> PartCost:
    """Costs so small that ties are frequent."""
    return PartCost(*(source.randint(0, 3) for _ in range(8)))


def random_costs(source: random.Random, num_layers: int, recompute: Recompute) -> ModelCosts:
    return ModelCosts(
        embedding=random_part(source),
        layers=tuple(random_part(source) for _ in range(num_layers)),
        head=random_part(source),
        shared_bytes=0,
        num_micro_batches=source.randint(1, 5),
        recompute=recompute,
        layers_ahead=source.choice([None, 0, 1, 2, 3]),
    )


def uniform_costs(num_layers: int, **changes: object) -> ModelCosts:
    """Layers of F = R = 1, B = 2 and a head of three layers' cost."""
    layer, head = PartCost(1, 1, 2, 100, 10, 1, 5), PartCost(6, 0, 6, 50, 0, 1, 7)
    settings = {
        "embedding": PartCost(0, 0, 0, 50, 0, 0, 0),
        "layers": (layer,) * num_layers,
        "head": head,
        "shared_bytes": 0,
        "num_micro_batches": 8,
        "recompute": "on_gradient",
    }
    return ModelCosts(**(settings | changes))  # type: ignore[arg-type]


def splits(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    return ((0, *rest) for rest in combinations(range(1, num_layers), num_stages - 1))


def slowest_and_fullest(costs: ModelCosts, boundaries: tuple[int, ...]) -> tuple[int, int]:
    """Time of the slowest and bytes of the fullest stage, counted part by part."""
    times, sizes = [], []
    num_stages = len(boundaries)
    for stage, first in enumerate(boundaries):
        parts = list(costs.layers[first : (*boundaries, len(costs.layers))[stage + 1]])
        parts += [costs.embedding] if stage == 0 else []
        parts += [costs.head] if stage == num_stages - 1 else []
        in_flight = min(num_stages - stage, costs.num_micro_batches)
        layers = (*boundaries, len(costs.layers))[stage + 1] - first
        ahead = layers if costs.layers_ahead is None else min(costs.layers_ahead, layers)
        ahead = ahead if costs.recompute == "while_waiting" else 0
        is_last = stage == num_stages - 1
        time, inputs, saved, rebuilt, together, beside = 0, 0, 0, [], 0, [0]
        for index, part in enumerate(parts):
            is_ahead = index in range(layers - ahead, layers)
            time += part.forward_flops + part.backward_flops
            time += 0 if is_ahead and is_last else part.recompute_flops
            if not ahead or index <= layers - ahead:
                inputs += part.input_bytes
            is_end = index >= layers
            saved += 0 if is_end else part.saved_bytes
            if is_ahead:
                together += part.saved_bytes
            if is_ahead or is_end or costs.recompute == "none":
                beside.append(part.saved_bytes if is_end else part.working_bytes)
            if not is_ahead:
                extra = 0 if is_end else part.working_bytes + part.dequantized_bytes
                rebuilt.append(part.saved_bytes + extra)
        if costs.recompute == "none":
            activations = in_flight * saved + max(beside)
            time -= sum(part.recompute_flops for part in parts)
        else:
            activations = in_flight * inputs + max([together + max(beside), *rebuilt])
        held = sum(part.frozen_bytes + part.adapter_bytes for part in parts) + activations
        if stage == 0 and stage == num_stages - 1:
            held -= costs.shared_bytes
        times.append(time)
        sizes.append(held)
    return max(times), max(sizes)


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_against_all_splits(recompute: Recompute) -> None:
    print(f"seed {SEED}")
    source = random.Random(SEED)
    for _ in range(150):
        num_layers = source.randint(1, 8)
        num_stages = source.randint(1, min(num_layers, 5))
        costs = random_costs(source, num_layers, recompute)
        ranked = sorted(
            (*slowest_and_fullest(costs, split), split) for split in splits(num_layers, num_stages)
        )
        assert partition(costs, num_stages) == ranked[0][-1], costs
        limit = source.choice([fullest for _, fullest, _ in ranked])
        fitting = next(split for _, fullest, split in ranked if fullest <= limit)
        assert partition(costs, num_stages, memory_limit_bytes=limit) == fitting, (costs, limit)


def test_loads_are_those_of_the_parts() -> None:
    print(f"seed {SEED}")
    source = random.Random(SEED)
    for recompute, num_stages in product(RECOMPUTES, (1, 2, 3)):
        costs = random_costs(source, 6, recompute)
        for split in splits(6, num_stages):
            loads = stage_loads(costs, split)
            assert [index for load in loads for index in load.layers] == list(range(6))
            slowest, fullest = slowest_and_fullest(costs, split)
            assert max(load.flops for load in loads) == slowest
            assert max(load.memory_bytes for load in loads) == fullest


def test_layers_of_the_stages() -> None:
    assert stage_layers((0, 4), 6) == (range(0, 4), range(4, 6))
    assert stage_layers((0,), 6) == (range(0, 6),)


def test_the_stage_of_the_head_has_fewer_layers() -> None:
    """13 layers of 4 and a head of 12: four stages of 16."""
    costs = uniform_costs(13)
    assert partition(costs, 4) == (0, 4, 8, 12)
    assert [load.flops for load in stage_loads(costs, (0, 4, 8, 12))] == [16] * 4


def test_a_last_stage_without_recompute_has_more_layers() -> None:
    """Without a head, 7 layers: three of F + R + B = 4 beside four of F + B = 3."""
    costs = uniform_costs(7, head=NOTHING, recompute="while_waiting")
    assert partition(costs, 2) == (0, 3)
    assert [load.flops for load in stage_loads(costs, (0, 3))] == [12, 12]
    assert [load.recompute_flops for load in stage_loads(costs, (0, 3))] == [3, 0]


def test_a_shared_embedding_is_held_once_on_one_stage_and_twice_on_two() -> None:
    costs = uniform_costs(4, shared_bytes=50)
    assert [load.frozen_bytes for load in stage_loads(costs, (0,))] == [450]
    assert [load.frozen_bytes for load in stage_loads(costs, (0, 2))] == [250, 250]


def test_activations_follow_the_micro_batches_in_flight() -> None:
    """Inputs of a byte, five to rebuild a layer, seven of the head; two micro-batches at the first stage."""
    expected = {
        ("none", None): [2 * 20, 10 + 7],
        ("on_gradient", None): [2 * 4 + 5, 3 + 7],
        ("while_waiting", None): [2 * 1 + 20, 1 + 17],
        ("while_waiting", 0): [2 * 4 + 5, 3 + 7],
        ("while_waiting", 1): [2 * 4 + 5, 2 + 12],
        ("while_waiting", 3): [2 * 2 + 15, 1 + 17],
    }
    for (recompute, number), activation_bytes in expected.items():
        costs = uniform_costs(6, recompute=recompute, layers_ahead=number)
        assert [load.activation_bytes for load in stage_loads(costs, (0, 4))] == activation_bytes


def test_layers_that_share_checkpoints_and_checkpoints_in_host_memory() -> None:
    """Inputs of 1 byte and activations of 5 and, of the head, 7; two micro-batches in flight on stage 0 of 6.

    Five layers on stage 0, one more with the head on stage 1.
    """
    for layers, offload, recompute, expected in (
        (1, False, "on_gradient", [2 * 5 + 5, 2 + 7]),
        (2, False, "on_gradient", [2 * 3 + 10, 2 + 7]),
        (9, False, "on_gradient", [2 * 1 + 25, 2 + 7]),
        # The head's input stays; of checkpoints there are two at a time.
        (2, True, "on_gradient", [10 + 2, 1 + 7]),
        # Two layers are recomputed ahead, from an input that stays, or keep their activations.
        (2, False, "while_waiting", [2 * (2 + 1) + 10, 1 + 5 + 7]),
        (2, True, "while_waiting", [2 * 1 + 10 + 2, 1 + 5 + 7]),
    ):
        costs = uniform_costs(
            6,
            recompute=recompute,
            layers_ahead=2,
            layers_per_checkpoint=layers,
            offload_checkpoints=offload,
        )
        found = [load.activation_bytes for load in stage_loads(costs, (0, 5))]
        assert found == expected, (layers, offload, recompute)


def test_as_many_layers_ahead_as_the_fullest_stage_has_memory_for() -> None:
    costs = uniform_costs(6, recompute="while_waiting")
    for number in range(1, 5):
        fullest = max(load.memory_bytes for load in stage_loads(replace(costs, layers_ahead=number), (0, 4)))
        assert most_layers_ahead(costs, (0, 4), fullest) >= number
        assert most_layers_ahead(costs, (0, 4), fullest - 1) < number
    assert most_layers_ahead(costs, (0, 4), 100) == 0


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_exactly_the_splits_are_accepted(num_stages: int) -> None:
    num_layers = 4
    valid = set(splits(num_layers, num_stages))
    for length in range(num_stages + 2):
        for given in product(range(-1, num_layers + 2), repeat=length):
            problems = boundary_problems(given, num_layers=num_layers, num_stages=num_stages)
            assert (not problems) == (given in valid), given
    for given in valid:
        assert check_boundaries(list(given), num_layers=num_layers, num_stages=num_stages) == given


@pytest.mark.parametrize(
    ("given", "num_stages", "expected"),
    [
        ([1, 3], 2, ["layer 0 skipped: stage 0 begins at layer 1"]),
        ([3, 4], 2, ["layers 0-2 skipped: stage 0 begins at layer 3"]),
        ([0, 4, 2], 3, ["layers 2-3 repeated: stage 2 begins at layer 2, stage 1 at layer 4"]),
        ([0, 3, 3], 3, ["stage 1 empty: stages 1 and 2 begin at layer 3"]),
        ([0, 6], 2, ["6 out of range: the layers are 0 to 5"]),
        ([-1, 2, 7], 3, ["-1, 7 out of range: the layers are 0 to 5"]),
        ([0, 3], 3, ["2 first layers for 3 stages (parallel.pipeline_stages)"]),
        ([2, 2], 3, ["2 first layers", "layers 0-1 skipped", "stage 0 empty"]),
    ],
)
def test_wrong_boundaries_are_named_with_the_remedy(
    given: list[int], num_stages: int, expected: list[str]
) -> None:
    problems = boundary_problems(given, num_layers=6, num_stages=num_stages)
    assert len(problems) == len(expected)
    example = {2: "[0, 3]", 3: "[0, 2, 4]"}[num_stages]
    for problem, part in zip(problems, expected, strict=True):
        assert problem.startswith(f"parallel.stage_boundaries: {given} given; {part}")
        assert f"such as {example}, or leave it out" in problem
    with pytest.raises(ConfigError) as caught:
        check_boundaries(given, num_layers=6, num_stages=num_stages)
    assert caught.value.problems == problems


def test_more_stages_than_layers() -> None:
    assert stage_count_problems(6, 6) == []
    (problem,) = stage_count_problems(7, 6)
    assert problem.startswith("parallel.pipeline_stages: 7 given; allowed: 1 to 6")
    assert problem.endswith("set it to 6 or less")
    assert boundary_problems(range(7), num_layers=6, num_stages=7) == [problem]
    with pytest.raises(ConfigError) as caught:
        partition(uniform_costs(6), 7)
    assert caught.value.problems == [problem]


def test_a_memory_limit_that_nothing_keeps() -> None:
    with pytest.raises(ConfigError, match=re.escape("2 given, 0.10 KiB for each stage")) as caught:
        partition(uniform_costs(6), 2, memory_limit_bytes=100)
    least = min(slowest_and_fullest(uniform_costs(6), split)[1] for split in splits(6, 2))
    assert f"a stage of at least {least / 1024:.2f} KiB" in caught.value.problems[0]


def test_the_table_states_what_each_stage_holds() -> None:
    gib = 2**30
    costs = uniform_costs(
        3,
        layers=(PartCost(1, 1, 2, 2 * gib, 3 * 2**20, 512, 1024),) * 3,
        head=PartCost(1, 0, 3, gib, 0, 0, 0),
        embedding=PartCost(0, 0, 0, gib // 2, 0, 0, 0),
        num_micro_batches=1,
    )
    assert (
        stage_table(costs, (0, 2))
        == """\
stage  holds                         layers  ahead  backbone  adapters  activations    memory   time
    0  embedding, layers 0-1              2      0  4.50 GiB  6.00 MiB     2.00 KiB  4.51 GiB  50.0%
    1  layer 2, norm, head and loss       1      0  3.00 GiB  3.00 MiB     1.50 KiB  3.00 GiB  50.0%
slowest stage: 1.000 x the mean"""
    )


def test_a_large_model_is_split_exactly() -> None:
    """80 layers of 4 and a head of 12 over 8 stages: 41.5 on average, and stages are multiples of 4."""
    costs = uniform_costs(80)
    assert max(load.flops for load in stage_loads(costs, partition(costs, 8))) == 44
