"""What training and evaluation see of data: token ids with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlora_dist.data.accounts import DatasetReport

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence of tokens.

    Args:
        input_ids: token ids, [S], kept as int32.
        labels: [S], kept as int32: at each position the token itself where it is trained, otherwise
            `IGNORE_INDEX` (not shifted: the loss compares position t with the output at t - 1). The first
            position never has a label, because nothing comes before it.
        num_scored: how many of the first target tokens count for exact match; None: all of them.
        metadata: what reports group by, such as `length` (tokens, a bucket) and `depth` (a fraction).
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    num_scored: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_tokens(
        cls,
        input_ids: Sequence[int],
        is_target: Sequence[bool],
        num_scored: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Example:
        """Makes the labels from a flag per token."""
        ids = np.asarray(input_ids, dtype=np.int32)
        labels = np.where(np.asarray(is_target, dtype=bool), ids, np.int32(IGNORE_INDEX))
        labels[:1] = IGNORE_INDEX
        return cls(ids, labels, num_scored, metadata or {})

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def scored_tokens(self) -> NDArray[np.bool_]:
        """Which tokens count for the exact match, [S]."""
        is_target = self.labels != IGNORE_INDEX
        return is_target if self.num_scored is None else is_target & (is_target.cumsum() <= self.num_scored)

    @property
    def num_targets(self) -> int:
        """How many tokens the loss is taken over."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))


@dataclass(frozen=True, eq=False)
class Dataset:
    """The examples of one source.

    Args:
        examples: in its order.
        report: how they came about.
        closings: what ends the turns of conversations in them.
    """

    examples: Sequence[Example]
    report: DatasetReport
    closings: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
