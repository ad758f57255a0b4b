"""Which rank sees which examples when: functions of seed, step and topology."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlora_dist.batches import IGNORED_LABEL, Batch
from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.collation import Row, collate
from ssmlora_dist.data.examples import Dataset, Example
from ssmlora_dist.data.packing import pack


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is shared out.

    Args:
        global_batch_size: rows of one step over all ranks, each an example or packed; a multiple of
            `micro_batch_size` times `data_parallel_size`.
        micro_batch_size: rows of one forward pass.
        data_parallel_rank: this rank.
        data_parallel_size: the number of ranks that share the batch.
        pad_token_id: what fills a batch's shorter rows.
        dropout_seed: of what adapters drop; None: nothing.
        sequence_rank: which part of its rows this rank computes.
        sequence_size: the number of ranks that share rows.

    Raises:
        ValueError: the sizes do not divide.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    pad_token_id: int
    dropout_seed: int | None = None
    sequence_rank: int = 0
    sequence_size: int = 1

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel_size):
            raise ValueError(
                f"global batch {self.global_batch_size} is no multiple of micro-batch "
                f"{self.micro_batch_size} x {self.data_parallel_size} data-parallel ranks"
            )

    def micro_batches(self, rows: Sequence[Row], step: int) -> list[Batch]:
        """This rank's micro-batches of global batch `step`, which has these rows."""
        seeds = self.dropout_seeds([len(row) for row in rows], step)
        share = self.global_batch_size // self.data_parallel_size
        begin = self.data_parallel_rank * share
        chosen = [
            slice(k, k + self.micro_batch_size) for k in range(begin, begin + share, self.micro_batch_size)
        ]
        return [self.own_part(rows[k], seeds[k] if seeds else None) for k in chosen]

    def own_part(
        self, rows: Sequence[Row], seeds: Sequence[Sequence[int]] | None = None, *, is_scored: bool = False
    ) -> Batch:
        """What this rank computes of some rows; see `collate`."""
        size = self.sequence_size
        batch = collate(rows, self.pad_token_id, seeds, is_scored=is_scored, multiple=size)
        return batch if size == 1 else batch.shard(self.sequence_rank, size)

    def dropout_seeds(self, num_examples: Sequence[int], step: int) -> list[list[int]] | None:
        """A seed for each example of global batch `step`, by row; None where nothing is dropped.

        It depends on `dropout_seed`, the step and the example's place in the global batch alone: on any
        number of ranks and with any micro-batch an example drops the same.
        """
        if self.dropout_seed is None:
            return None
        # With a spawn key, so that it is no sequence of an epoch's order.
        sequence = np.random.SeedSequence(self.dropout_seed, spawn_key=(step,))
        words = iter(sequence.generate_state(sum(num_examples), np.uint64).astype(np.int64).tolist())
        return [[next(words) for _ in range(number)] for number in num_examples]


class GlobalBatches:
    """The global batches of a run over examples that are in memory, and one rank's share of each.

    Rows of examples, in order, are endless: in each epoch every example once, in a fresh order. Global batch
    `step` is the next `global_batch_size` rows: it may span the end of an epoch and no example is left out.
    The order depends on the seed alone, so a run goes on at any step, on any number of ranks, with the
    batches it would have had, and has no position to save.

    Args:
        dataset: the examples.
        shape: of the batches.
        seed: of the order.
        row_tokens: several examples share a row, of at most so many tokens; None: each has its own.
    """

    def __init__(self, dataset: Dataset, shape: BatchShape, seed: int, row_tokens: int | None = None) -> None:
        self._dataset, self._shape, self._seed = dataset, shape, seed
        self._row_tokens = row_tokens
        self._epoch = 0
        self._rows = self._rows_of(0)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    def num_steps(self, num_epochs: float) -> int:
        """Steps that are needed for `num_epochs` passes over the examples."""
        return num_steps_of(num_epochs, self.num_rows, self._shape.global_batch_size)

    def indices(self, step: int) -> list[list[int]]:
        """The examples of global batch `step` (from 0), by row, in order, the same on every rank."""
        size = self._shape.global_batch_size
        return [self._row_at(position) for position in range(step * size, (step + 1) * size)]

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global batch `step`."""
        rows = [[self._dataset[index] for index in row] for row in self.indices(step)]
        return self._shape.micro_batches(rows, step)

    @property
    def report(self) -> DatasetReport:
        """What became of the rows of the source."""
        return self._dataset.report

    def position(self, step: int) -> None:
        """What a checkpoint needs beyond the number of steps to go on from there: nothing."""

    def close(self) -> None:
        """There is nothing to end."""

    def _row_at(self, position: int) -> list[int]:
        epoch, offset = divmod(position, self.num_rows)
        if epoch != self._epoch:
            self._rows, self._epoch = self._rows_of(epoch), epoch
        return [int(index) for index in self._rows[offset]]

    def _rows_of(self, epoch: int) -> Sequence[Any]:
        return rows_of_epoch(self._dataset, self._seed, epoch, self._row_tokens)


def rows_of_epoch(dataset: Dataset, seed: int, epoch: int, row_tokens: int | None) -> Sequence[Any]:
    """The examples of each row, in the order of training; as many rows in every epoch.

    Args:
        dataset: the examples.
        seed: of the order.
        epoch: from 0.
        row_tokens: see `GlobalBatches`.
    """
    order = permutation(len(dataset), seed, epoch)
    if row_tokens is None:
        rows: Sequence[Any] = order[:, None]  # type: ignore[assignment]
        return rows
    return shuffled(pack(dataset.lengths.tolist(), order.tolist(), row_tokens), seed, epoch)


def shuffled(rows: list[list[int]], *seeds: int) -> list[list[int]]:
    """Packed rows in an order that `seeds` decide: they come with the longest samples first."""
    return [rows[k] for k in permutation(len(rows), *seeds, len(rows))]


def permutation(length: int, *seeds: int) -> NDArray[np.int64]:
    """The numbers below `length`, [length], in an order that `seeds` decide, now and with any later numpy."""
    # RandomState's stream is frozen.
    bits = np.random.MT19937(np.random.SeedSequence(seeds))
    return np.random.RandomState(bits).permutation(length)


@dataclass(frozen=True)
class EvaluationBatch:
    """A batch of one rank.

    Args:
        batch: that asks for scores.
        indices: for each row its example's index in the data set, or None for a row that only fills the
            batch: a repeated example whose labels are all `IGNORED_LABEL`.
    """

    batch: Batch
    indices: list[int | None]


def evaluation_batches(dataset: Dataset, shape: BatchShape) -> Iterator[EvaluationBatch]:
    """One rank's share of a data set, each example on exactly one rank.

    Every rank gets the same number of batches of the same number of rows, as forward passes under ZeRO-3 are
    collective: the last ones are filled with rows that count for nothing. Examples of similar length go
    together, the longest first, so that little is padded and a lack of memory shows at once.

    Args:
        dataset: the examples.
        shape: of the batches of all ranks at a time.
    """
    by_length = sorted(range(len(dataset)), key=lambda index: -dataset.lengths[index])
    num_per_round = shape.micro_batch_size * shape.data_parallel_size
    for begin in range(0, len(by_length), num_per_round):
        chosen: list[int | None] = list(by_length[begin : begin + num_per_round])
        filler = _without_labels(dataset[by_length[-1]])
        chosen += [None] * (num_per_round - len(chosen))
        # Dealt in turn, so that a last round which is not full is spread over the ranks.
        mine = chosen[shape.data_parallel_rank :: shape.data_parallel_size]
        rows = [[filler if index is None else dataset[index]] for index in mine]
        yield EvaluationBatch(shape.own_part(rows, is_scored=True), mine)


def _without_labels(example: Example) -> Example:
    return replace(example, labels=np.full_like(example.labels, IGNORED_LABEL))


def num_steps_of(num_epochs: float, num_rows: int, global_batch_size: int) -> int:
    """Steps that are needed for `num_epochs` passes over so many rows."""
    # Rounding first keeps 0.1 x 30 from being a hair over 3.
    return max(1, math.ceil(round(num_epochs * num_rows / global_batch_size, 6)))
