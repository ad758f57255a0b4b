"""The learning rate of every step, computed by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from ssmlora_dist.training.schedule import learning_rate

PEAK = 0.3
SCHEDULES = ("cosine", "linear", "constant")


def rate(step: int, schedule: str, warmup_steps: int = 2, num_steps: int = 10) -> float:
    return learning_rate(step, schedule=schedule, peak=PEAK, warmup_steps=warmup_steps, num_steps=num_steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    assert [rate(step, schedule) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_peak(schedule: str) -> None:
    assert rate(0, schedule, warmup_steps=0) == PEAK


@pytest.mark.parametrize(
    ("schedule", "half_way", "last"),
    [
        ("cosine", PEAK / 2, PEAK / 2 * (1 + math.cos(math.pi * 7 / 8))),
        ("linear", PEAK / 2, PEAK / 8),
        ("constant", PEAK, PEAK),
    ],
)
def test_half_way_and_at_the_last_step(schedule: str, half_way: float, last: float) -> None:
    assert rate(6, schedule) == pytest.approx(half_way)
    assert rate(9, schedule) == pytest.approx(last)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_it_falls_from_step_to_step_towards_zero(schedule: str) -> None:
    after_warm_up = [rate(step, schedule) for step in range(2, 10)]
    assert all(later < earlier for earlier, later in itertools.pairwise(after_warm_up))
    assert after_warm_up[-1] > 0
    assert rate(10, schedule) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step(schedule: str) -> None:
    assert rate(0, schedule, warmup_steps=0, num_steps=1) == PEAK


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine, linear, constant"):
        rate(5, "exponential")
