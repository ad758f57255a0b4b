"""How the loss scale goes on from step to step."""

from __future__ import annotations

import math

import pytest

from ssmlora_dist.distributed import loss_scale
from ssmlora_dist.distributed.loss_scale import INITIAL, LARGEST, LEAST, LossScale


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_an_overflow_halves_it(norm: float) -> None:
    scale = LossScale(steady_steps=7)
    assert scale.update(2.0, norm)
    assert scale == LossScale(INITIAL / 2, 0)


def test_it_grows_after_steady_steps_and_counts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "STEADY_STEPS", 3)
    scale, values = LossScale(8.0), []
    for norm in (1.0, 1.0, math.inf, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0):
        scale.update(2.0, norm)
        values.append(scale.value)
    assert values == [8, 8, 4, 4, 4, 8, 8, 8, 16, 16]


def test_it_falls_no_further_than_to_one_and_then_says_so() -> None:
    scale = LossScale(2.0)
    assert scale.update(2.0, math.inf)
    assert scale.value == LEAST
    assert not scale.update(2.0, math.inf)
    assert scale.value == LEAST


def test_it_grows_no_further_than_float32_likes() -> None:
    scale = LossScale(LARGEST, loss_scale.STEADY_STEPS - 1)
    scale.update(2.0, 0.0)
    assert scale.value == LARGEST


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_itself_is_none_of_its_business(loss: float) -> None:
    scale = LossScale(steady_steps=7)
    assert not scale.update(loss, math.nan)
    assert scale == LossScale(INITIAL, 7)
