"""The loop with an engine that only reports: counting, order of calls, stopping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ssmlora_dist.distributed.engine import Check, StepResult, no_check
from ssmlora_dist.errors import EXIT_TRAINING_FAILED, TrainingError
from ssmlora_dist.training.loop import StepRecord, train


class ScriptedEngine:
    """Skips the steps that it is told to, and writes down what it is given."""

    def __init__(self, skipped: Sequence[bool], halved: Sequence[bool] = ()) -> None:
        self.skipped, self.halved = skipped, halved
        self.batches: list[list[int]] = []
        self.learning_rates: list[float] = []

    def train_step(
        self, micro_batches: Sequence[dict[str, Tensor]], learning_rate: float, check: Check = no_check
    ) -> StepResult:
        check()
        step = len(self.batches)
        self.batches.append([int(batch["input_ids"]) for batch in micro_batches])
        self.learning_rates.append(learning_rate)
        skipped = self.skipped[step]
        numbers = (math.nan if skipped else 2.0, math.inf if skipped else 1.0)
        if self.halved:
            return StepResult(*numbers, 8, 0, 4, skipped, loss_scale=1.0, scale_halved=self.halved[step])
        return StepResult(*numbers, 8, 0, 4, skipped)


def run(skipped: Sequence[bool], max_nonfinite_steps: int = 2) -> tuple[ScriptedEngine, list[StepRecord]]:
    """Runs as many steps as `skipped` has."""
    engine = ScriptedEngine(skipped)
    records: list[StepRecord] = []
    train(
        engine,
        lambda step: [{"input_ids": torch.tensor(10 * step + index)} for index in range(2)],
        lambda step: 0.5**step,
        num_steps=len(skipped),
        max_nonfinite_steps=max_nonfinite_steps,
        on_step=records.append,
    )
    return engine, records


def test_every_step_gets_its_batches_and_learning_rate() -> None:
    engine, records = run([False] * 3)
    assert engine.batches == [[0, 1], [10, 11], [20, 21]]
    assert engine.learning_rates == [1.0, 0.5, 0.25]
    assert [record.step for record in records] == [1, 2, 3]
    assert [record.learning_rate for record in records] == engine.learning_rates
    assert all(record.result.loss == 2.0 for record in records)


def test_skipped_steps_are_counted() -> None:
    _, records = run([False, True, False, True, False])
    assert [record.skipped_steps for record in records] == [0, 1, 1, 2, 2]


def test_a_good_step_starts_the_count_in_a_row_anew() -> None:
    engine, _ = run([True, False, True, False, True], max_nonfinite_steps=2)
    assert len(engine.batches) == 5


@pytest.mark.parametrize("max_nonfinite_steps", [1, 2, 3])
def test_too_many_skipped_steps_in_a_row_end_training(max_nonfinite_steps: int) -> None:
    engine = ScriptedEngine([False, *[True] * 5])
    records: list[StepRecord] = []
    with pytest.raises(TrainingError) as caught:
        train(
            engine,
            lambda step: [],
            lambda step: 1.0,
            num_steps=6,
            max_nonfinite_steps=max_nonfinite_steps,
            on_step=records.append,
        )
    last = 1 + max_nonfinite_steps
    assert caught.value.exit_code == EXIT_TRAINING_FAILED
    message = str(caught.value)
    assert f"step {last}:" in message
    assert f"in {max_nonfinite_steps} steps in a row (loss nan, gradient norm inf)" in message
    assert "Lower training.learning_rate" in message
    # The last one was reported before training stopped, and none came after it.
    assert [record.step for record in records] == list(range(1, last + 1))


def test_steps_lost_to_the_loss_scale_are_no_divergence_while_it_can_fall() -> None:
    halved = [*[True] * 6, *[False] * 4]
    engine = ScriptedEngine([True] * 10, halved)
    records: list[StepRecord] = []
    with pytest.raises(TrainingError, match=r"in 2 steps in a row.*model\.compute_dtype \"float32\""):
        train(
            engine,
            lambda step: [],
            lambda step: 1.0,
            num_steps=10,
            max_nonfinite_steps=2,
            on_step=records.append,
        )
    assert [record.skipped_steps for record in records] == list(range(1, 9))


def test_times_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 103.0, 110.0])  # start, batches there, step done
    monkeypatch.setattr("ssmlora_dist.training.loop.time.perf_counter", lambda: next(clock))
    _, [record] = run([False])
    assert record.data_seconds == 3.0
    assert record.step_seconds == 10.0


def test_on_step_comes_between_steps() -> None:
    """Evaluation happens there: it sees the step done and the next one not begun."""
    engine = ScriptedEngine([False] * 3)
    seen: list[tuple[int, int]] = []
    train(
        engine,
        lambda step: [],
        lambda step: 1.0,
        num_steps=3,
        max_nonfinite_steps=1,
        on_step=lambda record: seen.append((record.step, len(engine.batches))),
    )
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_a_continued_run_begins_behind_the_steps_done() -> None:
    engine = ScriptedEngine([True, False])
    records: list[StepRecord] = []
    train(
        engine,
        lambda step: [{"input_ids": torch.tensor(step)}],
        lambda step: 0.5**step,
        num_steps=5,
        max_nonfinite_steps=2,
        on_step=records.append,
        first_step=3,
        skipped_steps=4,
    )
    assert engine.batches == [[3], [4]]
    assert engine.learning_rates == [0.5**3, 0.5**4]
    assert [(record.step, record.skipped_steps) for record in records] == [(4, 5), (5, 5)]


def test_what_a_check_raises_ends_the_loop_before_the_step() -> None:
    engine = ScriptedEngine([False] * 3)

    def check() -> None:
        if len(engine.batches) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            engine,
            lambda step: [{"input_ids": torch.tensor(step)}],
            lambda step: 1.0,
            num_steps=3,
            max_nonfinite_steps=1,
            on_step=lambda record: None,
            check=check,
        )
    assert engine.batches == [[0]]
