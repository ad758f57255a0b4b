"""What a run trains on, step by step, and what it is evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ssmlora_dist.batches import Batch
from ssmlora_dist.config.build import build_data, row_tokens
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import (
    BatchShape,
    Dataset,
    DatasetReport,
    ExampleStream,
    GlobalBatches,
    StreamedBatches,
    rows_of_epoch,
)
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.tokenization import TextEncoder
from ssmlora_dist.training.contents import (
    check_ranks,
    check_train,
    pinned,
    revisions,
    same_validation,
    train_contents,
)
from ssmlora_dist.training.resume_point import ResumePoint
from ssmlora_dist.training.topology import ParallelDims


class RunData:
    """The examples of a run and this rank's micro-batches of every step.

    Args:
        config: of the run.
        tokenizer: of the model.
        context: its processes.
        dims: of this rank.
        resume_point: where the run goes on.
        warn: told what of the data a run should know, and of other validation data.

    Attributes:
        endings: what ends the answers that are trained, as adapters record it.
        validation: what is evaluated on, if anything.
        sample: of the training examples: all that are in memory, or the first of a stream.
        num_steps: optimiser steps of the run.
        num_examples: that are trained on; None: of a stream, not known.
        num_rows: that hold them; None: of a stream, not known.
        contents: of the data, as checkpoints keep them (`training.contents`).
        compares: whether validation losses in the checkpoint are of the same data.

    Raises:
        DataError: anything that keeps the data from being used, with file and line.
        CheckpointError: the training data are not those of the checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: Any,
        context: DistributedContext,
        dims: ParallelDims,
        resume_point: ResumePoint,
        warn: Callable[[str], object],
    ) -> None:
        training = config.training
        self._seed, self._rank = config.run.seed, context.rank
        self._shape = dims.batch_shape(
            training.global_batch_size,
            training.micro_batch_size,
            tokenizer.pad_token_id,
            config.run.seed if config.adapter.dropout else None,
        )
        commits = context.on_main(lambda: revisions(config, resume_point))
        train, self.validation = build_data(pinned(config, commits), tokenizer, warn, context.on_each_node)
        self._train, self._on_main = train, context.on_main
        self._row_tokens = row_tokens(config)
        self.contents = self._compared(config, train, commits, context, resume_point)
        self.compares = same_validation(resume_point, self.contents["validation"], warn)
        self.num_examples = None if isinstance(train, ExampleStream) else len(train)
        self.num_rows: int | None = None
        self.sample: Dataset
        self._batches: GlobalBatches | StreamedBatches
        if isinstance(train, ExampleStream):
            assert training.max_steps, "refused by config.rules"
            self.num_steps = training.max_steps
            self.sample = context.on_main(train.sample)
            checkpoint = resume_point.checkpoint
            start = checkpoint.progress["data_position"] if checkpoint else None
            self._batches = streamed = StreamedBatches(
                train, self._shape, context.on_main, resume_point.step, start
            )
            if start:
                # Other data show now, not once the model has been loaded.
                context.on_main(streamed.open)
        else:
            assert training.num_epochs or training.max_steps, "refused by config.rules"
            self.sample = train
            self._batches = batches = GlobalBatches(train, self._shape, self._seed, self._row_tokens)
            self.num_rows = batches.num_rows
            self.num_steps = training.max_steps or batches.num_steps(training.num_epochs or 1.0)
        encoder = TextEncoder(tokenizer)
        self.endings = encoder.endings(self.sample.closings)
        if (doubt := encoder.doubt(self.sample.closings)) is not None:
            warn(doubt)
        self._warn, self._warned = warn, False
        self._warn_of_rows_left_out()
        if self.validation is not None and (warning := self.validation.report.warning()) is not None:
            warn(f"data.validation: {warning}")

    def _compared(
        self,
        config: RunConfig,
        train: Dataset | ExampleStream,
        commits: dict[str, dict[str, str | None]],
        context: DistributedContext,
        resume_point: ResumePoint,
    ) -> dict[str, Any]:
        found = context.gather(train_contents(train))
        check_ranks(found)
        check_train(resume_point, found[0], config.data.train.task is not None)
        validation = self.validation.sha256 if self.validation else None
        return {"revisions": commits, "train": found[0], "validation": validation}

    def micro_batches(self, step: int) -> list[Batch]:
        """Of `step` (from 0); seeds what a backbone drops by itself, in its attention.

        Raises:
            DataError: of a stream, on every rank: the records to come cannot be used.
        """
        seed = np.random.SeedSequence([self._seed, step, self._rank])
        torch.manual_seed(int(seed.generate_state(1)[0]))
        batches = self._batches.micro_batches(step)
        self._warn_of_rows_left_out()
        return batches

    def probe_batches(self, number: int) -> list[Batch]:
        """The first micro-batches of training, as on one rank; every rank calls it."""
        size = self._shape.micro_batch_size
        alone = BatchShape(number * size, size, 0, 1, self._shape.pad_token_id)
        if isinstance(stream := self._train, ExampleStream):
            return alone.micro_batches(self._on_main(lambda: stream.first(number * size)), 0)
        return GlobalBatches(stream, alone, self._seed, self._row_tokens).micro_batches(0)

    def longest_micro_batch(self) -> Batch:
        """Of as many rows as a micro-batch has, the longest that are known, the same on every rank.

        Of a stream these are rows of its first examples.
        """
        rows, lengths = rows_of_epoch(self.sample, self._seed, 0, self._row_tokens), self.sample.lengths
        totals = np.fromiter((lengths[row].sum() for row in rows), np.int64, len(rows))
        order = np.argsort(-totals, kind="stable")
        chosen = [rows[order[k % len(order)]] for k in range(self._shape.micro_batch_size)]
        seeds = self._shape.dropout_seeds([len(row) for row in chosen], 0)
        return self._shape.own_part([[self.sample[int(i)] for i in row] for row in chosen], seeds)

    def accounts(self) -> list[str]:
        """Lines about what became of the records, of a stream the first ones."""
        lines = account_lines("train", self.sample.report, is_streamed=self.num_examples is None)
        if self.validation is not None:
            lines += account_lines("validation", self.validation.report)
        return lines

    def metrics(self) -> dict[str, float]:
        """What became of the records read so far, in numbers, for a tracker; on rank 0."""
        reports = {"train": self.report}
        if self.validation is not None:
            reports["validation"] = self.validation.report
        return {
            f"data/{name}_{key}": float(count)
            for name, report in reports.items()
            for key, count in report.counts().items()
        }

    def _warn_of_rows_left_out(self) -> None:
        """Once; of a stream as soon as what has been read shows it."""
        read = self.report if self.report.num_rows else self.sample.report
        if not self._warned and (warning := read.warning()) is not None:
            self._warned = True
            self._warn(
                f"data.train: {'of what is read so far, ' if self.num_examples is None else ''}{warning}"
            )

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
    first, *others = report.lines()
    headings = [f"{name:<13}", *[" " * 13] * len(others)]
    lines = [f"streamed; of the first rows: {first}" if is_streamed else first, *others]
    return [heading + line for heading, line in zip(headings, lines, strict=True)]
