from __future__ import annotations

import json
import math

import pytest

from ssmlora_dist.distributed.engine import StepResult
from ssmlora_dist.training.loop import StepRecord
from ssmlora_dist.training.totals import Totals


def record(step: int, loss: float = 2.0, skipped_steps: int = 0) -> StepRecord:
    counts = {"num_tokens": 100, "num_padding_tokens": 10, "num_target_tokens": 30}
    result = StepResult(loss, grad_norm=1.0, **counts, skipped=False)
    return StepRecord(step, 1e-3, result, step_seconds=0.5, data_seconds=0.1, skipped_steps=skipped_steps)


def test_steps_are_summed() -> None:
    totals = Totals()
    for step, loss in ((1, 3.0), (2, 2.5), (3, 2.0)):
        totals.add(record(step, loss, skipped_steps=step // 3))
    assert totals == Totals(3, 1, 300, 30, 90, 1.5, 3.0, 2.0)


def test_a_continued_run_counts_on() -> None:
    whole, first = Totals(), Totals()
    for step in range(1, 7):
        whole.add(record(step, 1 / step))
    for step in range(1, 4):
        first.add(record(step, 1 / step))
    continued = Totals(**json.loads(json.dumps(first.plain(), allow_nan=False)))
    for step in range(4, 7):
        continued.add(record(step, 1 / step))
    assert continued == whole


def test_a_loss_that_is_not_finite_is_none() -> None:
    totals = Totals()
    totals.add(record(1, math.nan))
    assert (totals.first_loss, totals.last_loss) == (None, None)
    totals.add(record(2, 2.0))
    assert (totals.first_loss, totals.last_loss) == (None, 2.0)
    totals.add(record(3, math.inf))
    assert totals.last_loss is None


def test_the_summary_has_rates_of_all_steps() -> None:
    totals = Totals()
    totals.add(record(1))
    totals.add(record(2))
    assert totals.summary(num_ranks=4) == {
        "num_steps": 2,
        "skipped_steps": 0,
        "num_tokens": 200,
        "num_padding_tokens": 20,
        "num_target_tokens": 60,
        "first_loss": 2.0,
        "last_loss": 2.0,
        "tokens_per_second": 200.0,
        "tokens_per_second_per_device": 50.0,
        "target_tokens_per_second": 60.0,
        "padding_share": 0.1,
    }


def test_a_run_without_steps_has_no_rate() -> None:
    assert math.isnan(Totals().summary(num_ranks=1)["tokens_per_second"])
    assert Totals().summary(num_ranks=1)["num_steps"] == pytest.approx(0)
