"""What training and evaluation see of data: token ids with labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ssmlora_dist.batches import IGNORED_LABEL
from ssmlora_dist.data.accounts import DatasetReport


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence of tokens.

    Args:
        input_ids: token ids, [S], kept as int32.
        labels: [S], kept as int32: at each position the token itself where it is trained, otherwise
            `IGNORED_LABEL` (not shifted: the loss compares position t with the output at t - 1). The first
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
        labels = np.where(np.asarray(is_target, dtype=bool), ids, np.int32(IGNORED_LABEL))
        labels[:1] = IGNORED_LABEL
        return cls(ids, labels, num_scored, metadata or {})

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def scored_tokens(self) -> NDArray[np.bool_]:
        """Which tokens count for the exact match, [S]."""
        is_target = self.labels != IGNORED_LABEL
        return is_target if self.num_scored is None else is_target & (is_target.cumsum() <= self.num_scored)

    @property
    def num_targets(self) -> int:
        """How many tokens the loss is taken over."""
        return int(np.count_nonzero(self.labels != IGNORED_LABEL))


class ExamplesDigest:
    """sha256 of token ids and labels in their order: of all that can be trained."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._digest = hashlib.sha256()
        for example in examples:
            self.add(example)

    def add(self, example: Example) -> None:
        self._digest.update(np.int64(example.num_tokens).tobytes())
        self._digest.update(example.input_ids.tobytes())
        self._digest.update(example.labels.tobytes())

    @property
    def sha256(self) -> str:
        """Of what was added so far, in hexadecimal."""
        return self._digest.hexdigest()


class StoredExamples(Sequence[Example]):
    """Examples in a file, of which only those that are asked for are read; see `data.prepared`.

    Args:
        file: as `prepared.prepare` has written it.
        num_targets: tokens that the loss is taken over, in all of them.
        sha256: their `ExamplesDigest`.
    """

    def __init__(self, file: Path, num_targets: int, sha256: str) -> None:
        import datasets

        self.num_targets, self.sha256 = num_targets, sha256
        self._rows = datasets.Dataset.from_file(str(file)).with_format("arrow")

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each, [N]."""
        import pyarrow.compute

        lengths: NDArray[np.int32] = pyarrow.compute.list_value_length(
            self._rows.data.column("input_ids")
        ).to_numpy()
        return lengths

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        row = self._rows[index]
        # Copies: tensors are not made of what cannot be written to.
        ids, is_target = (
            np.array(row.column(name).chunk(0).flatten().to_numpy(zero_copy_only=False))
            for name in ("input_ids", "is_target")
        )
        labels = np.where(is_target, ids, np.int32(IGNORED_LABEL))
        (num_scored,), (metadata,) = (row.column(name).to_pylist() for name in ("num_scored", "metadata"))
        return Example(ids, labels, num_scored, json.loads(metadata))


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

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example, [N]."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.lengths
        return np.asarray([example.num_tokens for example in self.examples], dtype=np.int32)

    @cached_property
    def num_targets(self) -> int:
        """How many tokens the loss is taken over, in all examples."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.num_targets
        return sum(example.num_targets for example in self.examples)

    @cached_property
    def sha256(self) -> str:
        """The `ExamplesDigest` of all examples."""
        if isinstance(self.examples, StoredExamples):
            return self.examples.sha256
        return ExamplesDigest(self.examples).sha256

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
