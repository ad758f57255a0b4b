"""Intervals against scipy, groups and baselines by hand."""

from __future__ import annotations

import math
import random

import pytest

from ssmlora_dist.evaluation.items import ChoiceItem, FailedItem, GenerationItem
from ssmlora_dist.evaluation.metrics import choice_accuracy, string_match_all, token_f1
from ssmlora_dist.evaluation.statistics import (
    Baseline,
    Estimate,
    ItemScores,
    estimate,
    majority_baseline,
    student_t_estimate,
    student_t_probability,
    student_t_quantile,
    summarize,
)

SEED = 7
# Both sides are float64 with a root or an inverse in them.
ROUNDING = 1e-9


def as_tuple(value: Estimate) -> tuple[float, float, float]:
    return value.mean, value.lower, value.upper


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 10, 99, 1000, 20001])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.9995])
def test_quantiles_of_student(degrees, probability):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.t.ppf(probability, degrees)
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize("degrees", [1, 2, 7, 30])
def test_probabilities_of_student_undo_its_quantiles(degrees):
    for probability in (0.5, 0.8, 0.95, 0.9995):
        value = student_t_quantile(probability, degrees)
        assert student_t_probability(value, degrees) == pytest.approx(probability, abs=ROUNDING)
        assert student_t_probability(-value, degrees) == pytest.approx(1 - probability, abs=ROUNDING)


def test_quantiles_of_student_in_tables():
    assert [round(student_t_quantile(0.975, degrees), 3) for degrees in (1, 2, 5, 30)] == [
        12.706,
        4.303,
        2.571,
        2.042,
    ]


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 7), (950, 1000)])
def test_shares(right, count):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    actual = estimate([1.0] * right + [0.0] * (count - right))
    assert as_tuple(actual) == pytest.approx((right / count, expected.low, expected.high), abs=ROUNDING)


def test_a_share_by_hand():
    # z = 1.959964: centre (0 + z^2 / 20) / (1 + z^2 / 10), and as much to either side.
    assert as_tuple(estimate([0.0] * 10)) == pytest.approx((0.0, 0.0, 0.2775328), abs=1e-7)


def test_graded_scores():
    stats = pytest.importorskip("scipy.stats")
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for count in (2, 3, 10, 200):
        values = [rng.uniform(0.4, 0.6) for _ in range(count)]
        mean = sum(values) / count
        low, high = stats.t.interval(0.95, count - 1, loc=mean, scale=stats.sem(values))
        expected = (mean, max(low, 0.0), min(high, 1.0))
        assert as_tuple(estimate(values)) == pytest.approx(expected, abs=ROUNDING)


def test_graded_scores_stay_in_range():
    assert as_tuple(estimate([0.0, 0.9, 1.0])) == pytest.approx((1.9 / 3, 0.0, 1.0))


def test_graded_scores_that_do_not_spread_are_not_certain():
    assert estimate([0.5] * 10) == estimate([0.0, 1.0] * 5)
    single = estimate([0.5])
    assert single.lower < 0.1
    assert single.upper > 0.9


@pytest.mark.parametrize("count", [2, 3, 10, 200])
def test_numbers_of_any_range(count):
    stats = pytest.importorskip("scipy.stats")
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    values = [rng.gauss(-300, 20) for _ in range(count)]
    mean = sum(values) / count
    expected = (mean, *stats.t.interval(0.95, count - 1, loc=mean, scale=stats.sem(values)))
    assert as_tuple(student_t_estimate(values)) == pytest.approx(expected, rel=ROUNDING)


def test_numbers_that_do_not_spread():
    # Three times 0.1 over 3 is not 0.1.
    assert as_tuple(student_t_estimate([0.1] * 3)) == (0.1, 0.1, 0.1)
    assert as_tuple(student_t_estimate([5.0])) == (5.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one value"):
        student_t_estimate([])


@pytest.mark.parametrize("values", [[], [0.5, 1.1], [-0.1], [float("nan")]])
def test_what_is_no_score(values):
    with pytest.raises(ValueError, match="at least one score, each from 0 to 1"):
        estimate(values)


RESULTS = [
    ItemScores({"f1": 1.0}, {"length": 1024, "depth": 0.5}),
    ItemScores({"f1": 0.0}, {"length": 512, "depth": 0.0}),
    ItemScores(None, {"length": 512, "depth": 0.5}),
    ItemScores({"f1": 0.0}, {"length": 512}),
    ItemScores(None),
]


def test_groups_and_failures_counted_apart():
    rows = [
        (dict(row.group), row.num_items, row.num_failed, {name: m.mean for name, m in row.metrics.items()})
        for row in summarize(RESULTS)
    ]
    assert rows == [
        ({}, 3, 2, {"f1": pytest.approx(1 / 3)}),
        ({"length": 512}, 2, 1, {"f1": 0.0}),
        ({"length": 1024}, 1, 0, {"f1": 1.0}),
        ({"depth": 0.0}, 1, 0, {"f1": 0.0}),
        ({"depth": 0.5}, 1, 1, {"f1": 1.0}),
        ({"length": 512, "depth": 0.0}, 1, 0, {"f1": 0.0}),
        ({"length": 512, "depth": 0.5}, 0, 1, {}),
        ({"length": 1024, "depth": 0.5}, 1, 0, {"f1": 1.0}),
    ]
    assert summarize(RESULTS)[0].metrics["f1"] == estimate([1.0, 0.0, 0.0])


def test_groupings_are_free():
    assert [row.group for row in summarize(RESULTS, [["depth"]])] == [{}, {"depth": 0.0}, {"depth": 0.5}]
    assert [row.num_items for row in summarize([])] == [0]


def choice(label: int, *choices: str) -> ChoiceItem:
    return ChoiceItem("0", "Q:", choices, label)


def test_majority_by_text_where_all_choose_among_the_same():
    items = [
        choice(0, " no", " yes"),
        choice(0, " yes", " no"),
        choice(1, " no", " yes"),
        FailedItem("3", "?"),
    ]
    assert majority_baseline(items, choice_accuracy, "acc") == Baseline(2 / 3, "yes")


def test_majority_by_position_elsewhere():
    items = [choice(1, " a", " b"), choice(1, " c", " d", " e"), choice(0, " f", " g"), choice(1, " h", " i")]
    assert majority_baseline(items, choice_accuracy, "acc") == Baseline(0.75, "choice 2")


def test_majority_of_generated_answers_is_scored_as_a_model_is():
    references = [("red hat", "red hat"), ("blue hat",), ("red hat", "hat"), ("hat",), ("blue hat",)]
    items = [GenerationItem("0", "Q:", texts, 4) for texts in references]
    # `red hat`, `blue hat` and `hat` stand in two items each, and `red hat` comes first.
    found = majority_baseline(items, token_f1, "f1")
    assert found == Baseline(pytest.approx((1 + 0.5 + 1 + 2 / 3 + 0.5) / 5), "red hat")
    assert majority_baseline(items, string_match_all, "string_match_all").score == pytest.approx(0.6)


def test_no_majority_without_items():
    assert majority_baseline([FailedItem("0", "?")], choice_accuracy, "acc") is None
