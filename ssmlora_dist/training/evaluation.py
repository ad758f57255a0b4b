"""Evaluation on a data set, spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ssmlora_dist.batches import Batch
from ssmlora_dist.data import BatchShape, Dataset, Example, evaluation_batches
from ssmlora_dist.evaluation.teacher_forced import ExampleScore, Score, summarize
from ssmlora_dist.progress import Progress, progress


def evaluate(
    score: Callable[[Iterable[Batch]], list[Any]],
    dataset: Dataset,
    *,
    shape: BatchShape,
    sum_over_ranks: Callable[[Sequence[float]], list[float]],
    description: str = "evaluation",
) -> dict[str, Score]:
    """Loss and teacher-forced exact match by input length and over all; every rank must call it.

    Args:
        score: gives the `models.loss.Scores` of each batch of this rank's share.
        dataset: the same on every rank.
        shape: of the batches, and which share of the examples this rank scores.
        sum_over_ranks: adds values up over the shares.
        description: of this evaluation, where its progress is shown.
    """
    batches = list(evaluation_batches(dataset, shape))
    rows_of = [[dataset[i] if i is not None else None for i in batch.indices] for batch in batches]

    def scored(shown: Progress) -> Iterator[Batch]:
        for done, batch in enumerate(batches):
            shown.update(done)
            yield batch.batch

    with progress(description, len(batches)) as shown:
        results = score(scored(shown))
        shown.update(len(batches))
    scores = [
        ExampleScore(_group(example), loss, num_targets, exact)
        for rows, result in zip(rows_of, results, strict=True)
        for example, loss, num_targets, exact in zip(
            rows, *(values.tolist() for values in result), strict=True
        )
        if example
    ]
    groups = sorted({_group(example) for example in dataset.examples}, key=int)
    return summarize(scores, groups, sum_over_ranks)


def _group(example: Example) -> str:
    return str(example.metadata["length"])
