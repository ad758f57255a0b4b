"""Batches within a token budget, and their padding."""

from __future__ import annotations

import random

import pytest
import torch

from ssmlora_dist.evaluation.batching import (
    Size,
    deal_out,
    left_padded,
    padded_tokens,
    plan_batches,
    right_padded,
)
from tests.tiny import SEED


def test_batches_hold_all_items_within_the_budget() -> None:
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    for budget in (1, 40, 100, 500):
        sizes = [Size(draw.randrange(1, 60), draw.randrange(0, 20)) for _ in range(50)]
        batches = plan_batches(sizes, budget)
        assert sorted(index for batch in batches for index in batch) == list(range(50))
        for batch in batches:
            padded = max(sizes[i].prompt for i in batch) + max(sizes[i].answer for i in batch)
            assert len(batch) == 1 or len(batch) * padded <= budget
        totals = [sum(sizes[i]) for batch in batches for i in batch]
        assert totals == sorted(totals, reverse=True)
    assert len(plan_batches([Size(10, 0)] * 20, 50)) == 4, "batches are full"


def test_tokens_of_a_batch_are_those_that_fit_the_budget() -> None:
    assert padded_tokens([Size(7, 3), Size(9, 1)]) == 2 * (9 + 3)
    assert plan_batches([Size(7, 3), Size(9, 1)], 24) == [[1, 0]]
    assert plan_batches([Size(7, 3), Size(9, 1)], 23) == [[1], [0]]


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_dealt_out_evenly_over_the_ranks(num_ranks: int) -> None:
    draw = random.Random(SEED)
    print(f"seed {SEED}")
    loads = [0] * num_ranks
    dearest = 0
    for num_batches in (1, 1, 2, 1, 0, 7, 1):
        costs = [draw.randrange(1, 1000) for _ in range(num_batches)]
        shares = deal_out(costs, loads)
        assert sorted(index for share in shares for index in share) == list(range(num_batches))
        assert all(share == sorted(share) for share in shares), "in the order they came in"
        loads = [load + sum(costs[i] for i in share) for load, share in zip(loads, shares, strict=True)]
        dearest = max([dearest, *costs])
        assert max(loads) - min(loads) <= dearest


def test_the_dearest_are_dealt_out_first() -> None:
    assert deal_out([2, 3, 4], [0, 0]) == [[2], [0, 1]]
    assert deal_out([2, 3, 4], [5, 0]) == [[0], [1, 2]]
    assert deal_out([], [0, 0]) == [[], []]


def test_left_padding() -> None:
    prompts = left_padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert prompts.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert prompts.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prompts.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_right_padding() -> None:
    input_ids, mask = right_padded([[5, 6], [], [8]], torch.device("cpu"))
    assert input_ids.tolist() == [[5, 6], [0, 0], [8, 0]]
    assert mask.tolist() == [[1, 1], [0, 0], [1, 0]]
