"""Which rank sees which examples when: functions of seed, step and topology."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.collation import collate
from ssmlora_dist.data.examples import IGNORE_INDEX, Dataset, Example


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is shared out.

    Args:
        global_batch_size: examples of one step over all ranks; a multiple of `micro_batch_size` times
            `data_parallel_size`.
        micro_batch_size: examples of one forward pass.
        data_parallel_rank: this rank.
        data_parallel_size: the number of ranks that share the batch.
        pad_token_id: what fills a batch's shorter rows.

    Raises:
        ValueError: the sizes do not divide.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    pad_token_id: int

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel_size):
            raise ValueError(
                f"global batch {self.global_batch_size} is no multiple of micro-batch "
                f"{self.micro_batch_size} x {self.data_parallel_size} data-parallel ranks"
            )

    def micro_batches(self, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of a global batch, collated."""
        share = self.global_batch_size // self.data_parallel_size
        begin = self.data_parallel_rank * share
        return [
            collate(examples[k : k + self.micro_batch_size], self.pad_token_id)
            for k in range(begin, begin + share, self.micro_batch_size)
        ]

    def dropout_seeds(self, step: int, seed: int) -> list[Tensor]:
        """A seed for each row of this rank's micro-batches of global batch `step`, each [B] int64.

        It depends on `seed`, the step and the row's place in the global batch alone: on any number of ranks
        and with any micro-batch an example drops the same.
        """
        # With a spawn key, so that it is no sequence of an epoch's order.
        sequence = np.random.SeedSequence(seed, spawn_key=(step,))
        words = sequence.generate_state(self.global_batch_size, np.uint64).astype(np.int64)
        share = self.global_batch_size // self.data_parallel_size
        begin = self.data_parallel_rank * share
        return list(torch.from_numpy(words)[begin : begin + share].split(self.micro_batch_size))


class GlobalBatches:
    """The global batches of a run over examples that are in memory, and one rank's share of each.

    The examples are an endless row, a fresh permutation for each epoch, and global batch `step` is the next
    `global_batch_size` of it: a batch may span the end of an epoch and no example is left out. The row
    depends on the seed alone, so a run goes on at any step, on any number of ranks, with the batches it would
    have had, and has no position to save.

    Args:
        dataset: the examples.
        shape: of the batches.
        seed: of the order.
    """

    def __init__(self, dataset: Dataset, shape: BatchShape, seed: int) -> None:
        self._dataset, self._shape, self._seed = dataset, shape, seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def num_steps(self, num_epochs: float) -> int:
        """Steps that are needed for `num_epochs` passes over the examples."""
        return num_steps_of(num_epochs, len(self._dataset), self._shape.global_batch_size)

    def indices(self, step: int) -> list[int]:
        """The examples of global batch `step` (from 0), in order, the same on every rank."""
        size = self._shape.global_batch_size
        return [self._index_at(position) for position in range(step * size, (step + 1) * size)]

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of global batch `step`, collated."""
        return self._shape.micro_batches([self._dataset[index] for index in self.indices(step)])

    @property
    def report(self) -> DatasetReport:
        """What became of the rows of the source."""
        return self._dataset.report

    def position(self, step: int) -> None:
        """What a checkpoint needs beyond the number of steps to go on from there: nothing."""

    def close(self) -> None:
        """There is nothing to end."""

    def _index_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._dataset))
        if epoch != self._epoch:
            self._order = permutation(len(self._dataset), self._seed, epoch)
            self._epoch = epoch
        return int(self._order[offset])


def permutation(length: int, *seeds: int) -> NDArray[np.int64]:
    """The numbers below `length`, [length], in an order that `seeds` decide, now and with any later numpy."""
    # RandomState's stream is frozen.
    bits = np.random.MT19937(np.random.SeedSequence(seeds))
    return np.random.RandomState(bits).permutation(length)


@dataclass(frozen=True)
class EvaluationBatch:
    """A batch of one rank.

    Args:
        tensors: as from `collate`.
        indices: for each row its example's index in the data set, or None for a row that only fills the
            batch: a repeated example whose labels are all `IGNORE_INDEX`.
    """

    tensors: dict[str, Tensor]
    indices: list[int | None]


def evaluation_batches(
    dataset: Dataset, micro_batch_size: int, rank: int, size: int, pad_token_id: int
) -> Iterator[EvaluationBatch]:
    """One rank's share of a data set, each example on exactly one rank.

    Every rank gets the same number of batches of the same number of rows, as forward passes under ZeRO-3 are
    collective: the last ones are filled with rows that count for nothing. Examples of similar length go
    together, the longest first, so that little is padded and a lack of memory shows at once.

    Args:
        dataset: the examples.
        micro_batch_size: rows of a batch.
        rank: this data-parallel rank.
        size: the number of data-parallel ranks.
        pad_token_id: what fills a batch's shorter rows.
    """
    by_length = sorted(range(len(dataset)), key=lambda index: -dataset.lengths[index])
    num_per_round = micro_batch_size * size
    for begin in range(0, len(by_length), num_per_round):
        chosen: list[int | None] = list(by_length[begin : begin + num_per_round])
        filler = _without_labels(dataset[by_length[-1]])
        chosen += [None] * (num_per_round - len(chosen))
        # Dealt in turn, so that a last round which is not full is spread over the ranks.
        mine = chosen[rank::size]
        rows = [filler if index is None else dataset[index] for index in mine]
        yield EvaluationBatch(collate(rows, pad_token_id), mine)


def _without_labels(example: Example) -> Example:
    return replace(example, labels=np.full_like(example.labels, IGNORE_INDEX))


def num_steps_of(num_epochs: float, num_examples: int, global_batch_size: int) -> int:
    """Steps that are needed for `num_epochs` passes over so many examples."""
    # Rounding first keeps 0.1 x 30 from being a hair over 3.
    return max(1, math.ceil(round(num_epochs * num_examples / global_batch_size, 6)))
