"""Evaluation with a model that scores as it is told: which tokens count, groups, ranks, filler rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from ssmlora_dist.batches import Batch
from ssmlora_dist.data import BatchShape, Dataset, DatasetReport, Example
from ssmlora_dist.models.loss import Scores
from ssmlora_dist.training.evaluation import evaluate

IGNORED = -100


def example(length: int, num_targets: int, num_scored: int | None = None, first: int = 1) -> Example:
    """`length` tokens counted up from `first`, the last `num_targets` of them trained."""
    is_target = [index >= length - num_targets for index in range(length)]
    return Example.from_tokens(range(first, first + length), is_target, num_scored, {"length": length})


def dataset(*examples: Example) -> Dataset:
    return Dataset(list(examples), DatasetReport(len(examples), len(examples)))


@pytest.mark.parametrize(
    ("labels", "num_scored", "expected"),
    [
        ([IGNORED, IGNORED, 7, 8, 9], 2, [False, False, True, True, False]),
        ([IGNORED, IGNORED, 7, 8, 9], None, [False, False, True, True, True]),
        ([IGNORED, IGNORED, 7, 8, 9], 5, [False, False, True, True, True]),
        # Targets with a gap between them: the first two turns of a conversation.
        ([IGNORED, 5, IGNORED, 6, 7], 2, [False, True, False, True, False]),
        ([IGNORED, 5, IGNORED, 6, 7], 0, [False] * 5),
    ],
)
def test_the_first_target_tokens_are_scored(
    labels: list[int], num_scored: int | None, expected: list[bool]
) -> None:
    row = Example(torch.zeros(5).numpy(), torch.tensor(labels).numpy(), num_scored)
    assert row.scored_tokens.tolist() == expected


class FirstTokenScorer:
    """Scores a row by its first token t: loss t per target, exact where t is even."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, batches: Iterable[Batch]) -> list[Scores]:
        return [self._score(batch) for batch in batches]

    def _score(self, batch: Batch) -> Scores:
        assert batch.scored is not None
        self.shapes.append(batch.shape)
        num_rows, num_tokens = batch.shape
        num_targets = torch.bincount(batch.places // num_tokens, minlength=num_rows)
        first = batch.inputs["input_ids"][:, 0]
        return Scores((first * num_targets).float(), num_targets, first % 2 == 0)


class Summed:
    """What one rank adds up, kept for the test to add the other ranks' to."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, values: Sequence[float]) -> list[float]:
        self.values = list(values)
        return self.values


EXAMPLES = dataset(
    example(8, 2, first=2),
    example(4, 1, first=3),
    example(8, 2, first=5),
    example(4, 3, first=4),
    example(4, 1, first=6),
)


def run(
    rank: int = 0, world_size: int = 1, micro_batch_size: int = 2, data: Dataset = EXAMPLES
) -> tuple[dict[str, Any], Summed, FirstTokenScorer]:
    summed, scorer = Summed(), FirstTokenScorer()
    scores = evaluate(
        scorer,
        data,
        shape=BatchShape(micro_batch_size * world_size, micro_batch_size, rank, world_size, 0),
        sum_over_ranks=summed,
    )
    return scores, summed, scorer


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 8])
def test_scores_by_length_and_over_all(micro_batch_size: int) -> None:
    scores, _, _ = run(micro_batch_size=micro_batch_size)
    assert list(scores) == ["4", "8", "all"]
    # Losses 3 x 1, 4 x 3 and 6 x 1 over 5 targets; 2 x 2 and 5 x 2 over 4 targets.
    assert [scores[length].num_examples for length in scores] == [3, 2, 5]
    assert [scores[length].loss for length in scores] == pytest.approx([21 / 5, 14 / 4, 35 / 9])
    assert [scores[length].exact_match for length in scores] == pytest.approx([2 / 3, 1 / 2, 3 / 5])


def test_ranks_share_the_examples_and_run_equally_often() -> None:
    _, alone, _ = run()
    _, first, first_scorer = run(rank=0, world_size=2)
    _, second, second_scorer = run(rank=1, world_size=2)
    assert [a + b for a, b in zip(first.values, second.values, strict=True)] == alone.values
    # Under ZeRO 3 a forward pass is collective.
    assert len(first_scorer.shapes) == len(second_scorer.shapes)


def test_lengths_are_in_the_order_of_numbers() -> None:
    data = dataset(example(16, 1), example(2, 1), example(128, 1))
    scores, _, _ = run(micro_batch_size=1, data=data)
    assert list(scores) == ["2", "16", "128", "all"]
