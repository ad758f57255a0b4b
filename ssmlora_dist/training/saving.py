"""When a run saves a checkpoint, and what it puts into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.progress import progress
from ssmlora_dist.training.checkpoint_writer import BackgroundWriter
from ssmlora_dist.training.checkpoints import Checkpoint
from ssmlora_dist.training.resume_point import ResumePoint
from ssmlora_dist.training.topology import TopologyEngine


class Saver:
    """Saves checkpoints: every rank calls its methods, rank 0 writes.

    Args:
        config: of the run.
        context: its processes.
        engine: holds what is saved.
        directory: of the run's checkpoints.
        base: how to load the base model, kept with the adapter.
        base_fingerprint: of the base model; rank 0's counts.
        contents: what the run works on, kept in checkpoints.
        resume_point: where the run began.
        warn: told when a save has failed.
        compares: whether the best validation loss of the checkpoint is of the same data.

    Attributes:
        last_step: the step saved last.
        best_validation_loss: of all evaluations so far.
    """

    def __init__(
        self,
        config: RunConfig,
        context: DistributedContext,
        engine: TopologyEngine,
        directory: Path,
        base: Mapping[str, Any],
        base_fingerprint: str,
        contents: dict[str, Any],
        resume_point: ResumePoint,
        warn: Callable[[str], object],
        *,
        compares: bool = True,
    ) -> None:
        self._config, self._context, self._engine = config, context, engine
        self._base_fingerprint, self._contents = base_fingerprint, contents
        section = config.checkpoint
        self._every_steps = section.every_steps
        self._writer = BackgroundWriter(
            directory,
            config.adapter,
            base,
            keep=section.keep,
            keep_best=section.keep_best,
            warn=warn,
            on_written=lambda path: context.note_checkpoint(str(path)),
            last_good=resume_point.path,
        )
        if resume_point.path is not None:
            context.note_checkpoint(str(resume_point.path))
        self.last_step = resume_point.step
        checkpoint = resume_point.checkpoint if compares else None
        self.best_validation_loss: float | None = (
            checkpoint.progress["best_validation_loss"] if checkpoint else None
        )

    def is_due(self, step: int, validation_loss: float | None = None) -> bool:
        """Whether to save after `step`: every so many steps, and when the validation loss is the best yet."""
        if self._every_steps is None:
            return False
        return step % self._every_steps == 0 or self.is_best(validation_loss)

    def is_best(self, validation_loss: float | None) -> bool:
        """Whether parameters of this validation loss are to be kept as the best ones."""
        section, best = self._config.checkpoint, self.best_validation_loss
        if section.every_steps is None or not section.keep_best or validation_loss is None:
            return False
        return math.isfinite(validation_loss) and (best is None or validation_loss < best)

    def save(self, step: int, train_state: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """Copies out what is trained, and has it written while training goes on.

        Args:
            step: steps done.
            train_state: what else the run needs to go on, in JSON types.
            validation_loss: of these parameters, if they have been evaluated.
        """
        if self.is_best(validation_loss):
            self.best_validation_loss = validation_loss
        with progress("collecting what is trained"):
            parameters, optimizer_state = self._engine.adapter_tensors(), self._engine.optimizer_state()
        loss_scale = self._engine.loss_scale
        self.last_step = step
        if not self._context.is_main:
            return
        # It waits for the one before.
        with progress("waiting for the checkpoint before"):
            self._writer.save(
                Checkpoint(
                    step=step,
                    parameters=parameters,
                    moments=optimizer_state.tensors,
                    progress={
                        **train_state,
                        "num_updates": optimizer_state.num_updates,
                        "loss_scale": asdict(loss_scale) if loss_scale else None,
                        "samples_consumed": step * self._config.training.global_batch_size,
                        "best_validation_loss": self.best_validation_loss,
                    },
                    config=self._config.model_dump(mode="json", by_alias=True),
                    contents=self._contents,
                    base_fingerprint=self._base_fingerprint,
                    validation_loss=validation_loss,
                )
            )

    def finish(self) -> str:
        """Waits for what is being written; says on every rank what `last_good` says."""
        said: str = self._context.on_main(self.last_good)
        return said

    def last_good(self) -> str:
        """Says, on rank 0, where the last good checkpoint is, once what is being written has been."""
        with progress("waiting for the checkpoint"):
            self._writer.wait()
        return checkpoint_text(self._writer.last_good)

    def last_good_here(self) -> str:
        """What `last_good` says, on any rank by itself: others than rank 0 know what that has told them."""
        if self._context.is_main:
            return self.last_good()
        noted = self._context.noted_checkpoint
        # Rank 0 may have written another since.
        return checkpoint_text(None) if noted is None else f"a good checkpoint is {noted}"


def checkpoint_text(path: Path | str | None) -> str:
    """Says where the last good checkpoint is, if any."""
    return "no checkpoint has been saved" if path is None else f"the last good checkpoint is {path}"
