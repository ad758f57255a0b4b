"""What a run trains on, step by step, and what it is evaluated on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmlora_dist.config.build import build_data
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import (
    BatchShape,
    Dataset,
    DatasetReport,
    ExampleStream,
    GlobalBatches,
    StreamedBatches,
)
from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.training.continuation import Continuation
from ssmlora_dist.training.topology import Place


class RunData:
    """The examples of a run and this rank's micro-batches of every step.

    Args:
        config: of the run.
        tokenizer: of the model.
        group: its processes.
        place: of this rank.
        continuation: where the run goes on.

    Attributes:
        validation: what is evaluated on, if anything.
        sample: of the training examples: all that are in memory, or the first of a stream.
        num_steps: optimiser steps of the run.
        num_examples: that are trained on; None: of a stream, not known.

    Raises:
        DataError: anything that keeps the data from being used, with file and line.
    """

    def __init__(
        self, config: RunConfig, tokenizer: Any, group: ProcessGroup, place: Place, continuation: Continuation
    ) -> None:
        training = config.training
        self._seed, self._rank = config.run.seed, group.rank
        self._drops = config.adapter.dropout > 0
        self._shape = BatchShape(
            training.global_batch_size,
            training.micro_batch_size,
            place.data_parallel_rank,
            place.data_parallel_size,
            tokenizer.pad_token_id,
        )
        train, self.validation = build_data(config, tokenizer)
        self.num_examples = None if isinstance(train, ExampleStream) else len(train)
        self.sample: Dataset
        self._batches: GlobalBatches | StreamedBatches
        if isinstance(train, ExampleStream):
            assert training.max_steps, "refused by config.rules"
            self.num_steps = training.max_steps
            self.sample = group.on_main(train.sample)
            checkpoint = continuation.checkpoint
            start = checkpoint.progress["data_position"] if checkpoint else None
            self._batches = StreamedBatches(train, self._shape, group.on_main, continuation.step, start)
        else:
            assert training.num_epochs or training.max_steps, "refused by config.rules"
            self.sample = train
            self._batches = GlobalBatches(train, self._shape, self._seed)
            self.num_steps = training.max_steps or self._batches.num_steps(training.num_epochs or 1.0)

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """Of `step` (from 0), collated; seeds what a backbone drops by itself, in its attention.

        Raises:
            DataError: of a stream, on every rank: the records to come cannot be used.
        """
        seed = np.random.SeedSequence([self._seed, step, self._rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        batches = self._batches.micro_batches(step)
        if not self._drops:
            return batches
        rows = self._shape.dropout_seeds(step, self._seed)
        return [{**batch, "dropout_seeds": seeds} for batch, seeds in zip(batches, rows, strict=True)]

    def facts(self) -> dict[str, Any]:
        """What `header.run_header` says of the data."""
        return {
            "num_steps": self.num_steps,
            "num_examples": self.num_examples,
            "accounts": self.accounts(),
        }

    def accounts(self) -> list[str]:
        """Lines about what became of the records, of a stream the first ones."""
        lines = account_lines("train", self.sample.report, is_streamed=self.num_examples is None)
        if self.validation is not None:
            lines += account_lines("validation", self.validation.report)
        return lines

    @property
    def report(self) -> DatasetReport:
        """What became of the rows of the training data."""
        return self._batches.report

    def position(self, step: int) -> dict[str, Any] | None:
        """On rank 0: what a checkpoint after `step` steps needs to find the next example."""
        return self._batches.position(step)

    def close(self) -> None:
        """Ends the reading."""
        self._batches.close()


def account_lines(name: str, report: DatasetReport, is_streamed: bool = False) -> list[str]:
    """Lines about what became of the records of a source."""
    line = (
        f"{report.num_examples} examples of {report.num_rows} rows; {report.num_dropped_too_long} dropped as "
        f"too long, {report.num_truncated} truncated, {report.num_without_target} without target"
    )
    return [f"{name:<13}{'streamed; of the first rows: ' if is_streamed else ''}{line}"]
