"""Batches within a token budget, and their padding."""

from __future__ import annotations

import random

import torch

from ssmlora_dist.evaluation.batching import Size, left_padded, plan_batches, right_padded
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


def test_left_padding() -> None:
    prompts = left_padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert prompts.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert prompts.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert prompts.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_right_padding() -> None:
    input_ids, mask = right_padded([[5, 6], [], [8]], torch.device("cpu"))
    assert input_ids.tolist() == [[5, 6], [0, 0], [8, 0]]
    assert mask.tolist() == [[1, 1], [0, 0], [1, 0]]
