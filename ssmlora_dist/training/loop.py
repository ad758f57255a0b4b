"""The training loop, the same for every topology: it sees an engine, batches and a learning rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ssmlora_dist.batches import Batch
from ssmlora_dist.distributed.engine import Check, StepResult, no_check
from ssmlora_dist.errors import TrainingError


class Engine(Protocol):
    """What the loop needs of a topology."""

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, check: Check = no_check
    ) -> StepResult:
        """One step of the optimiser on this rank's micro-batches; what `check` raises ends it before that."""


@dataclass(frozen=True)
class StepRecord:
    """One step, as it is logged.

    Attributes:
        step: number of the step, from 1.
        learning_rate: used in the step.
        result: what the step did.
        step_seconds: wall time, the wait for data included.
        data_seconds: the wait for data.
        skipped_steps: steps skipped so far.
    """

    step: int
    learning_rate: float
    result: StepResult
    step_seconds: float
    data_seconds: float
    skipped_steps: int


def train(
    engine: Engine,
    micro_batches: Callable[[int], Sequence[Batch]],
    learning_rate: Callable[[int], float],
    *,
    num_steps: int,
    max_nonfinite_steps: int,
    on_step: Callable[[StepRecord], None],
    first_step: int = 0,
    skipped_steps: int = 0,
    check: Check = no_check,
    last_good: Callable[[], str] = lambda: "nothing was saved",
) -> None:
    """Runs steps `first_step` to `num_steps` - 1.

    Args:
        engine: a topology.
        micro_batches: this rank's micro-batches of a step.
        learning_rate: of a step.
        num_steps: steps of the optimiser.
        max_nonfinite_steps: skipped steps in a row after which training stops.
        on_step: called after every step, on every rank; evaluation, logging and saving happen there.
        first_step: number of steps done before.
        skipped_steps: of these, how many were skipped.
        check: called between micro-batches, on every rank; what it raises passes through.
        last_good: says where the last good checkpoint is; called on every rank where training has to stop.

    Raises:
        TrainingError: loss or gradients were not finite too many times in a row.
    """
    skipped, in_a_row = skipped_steps, 0
    for step in range(first_step, num_steps):
        started = time.perf_counter()
        batches = micro_batches(step)
        data_seconds = time.perf_counter() - started
        rate = learning_rate(step)
        result = engine.train_step(batches, rate, check)
        skipped += result.skipped
        # What a smaller loss scale may mend says nothing of the run.
        if not result.scale_halved:
            in_a_row = in_a_row + 1 if result.skipped else 0
        on_step(StepRecord(step + 1, rate, result, time.perf_counter() - started, data_seconds, skipped))
        if in_a_row >= max_nonfinite_steps:
            narrow = "" if result.loss_scale is None else 'begin anew with model.compute_dtype "float32", '
            raise TrainingError(
                f"step {step + 1}: loss or gradients were not finite in {in_a_row} steps in a row "
                f"(loss {result.loss}, gradient norm {result.grad_norm}); nothing was updated in them. "
                f"Lower training.learning_rate, lengthen training.warmup_steps, {narrow}or look for damaged "
                f"data; {last_good()}"
            )
