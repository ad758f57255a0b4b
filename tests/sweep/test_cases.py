"""Which points make up a case, in which order, and their means over seeds against scipy."""

from __future__ import annotations

import math
import random

import pytest

from ssmlora_dist.sweep.cases import UNSET, Measured, length_of, measure, natural, part_of, text_of
from tests.sweep.results import full_sweep, lost, result, sweep_of

SEED = 11
# Both sides are float64 with a root or an inverse in them.
ROUNDING = 1e-9


def test_means_over_seeds_as_scipy_has_them():
    stats = pytest.importorskip("scipy.stats")
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for count in (2, 3, 5, 12):
        values = [rng.gauss(3, 2) for _ in range(count)]
        points = [result("lora", seed, {"final_loss": value}) for seed, value in enumerate(values)]
        [case] = sweep_of(*points, lost("lora", count)).cases
        found = case.measure("final_loss")
        low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
        expected = (sum(values) / count, low, high)
        assert (found.mean, found.lower, found.upper) == pytest.approx(expected, rel=ROUNDING)
        assert found.count == count


def test_scores_keep_to_their_range():
    found = measure([0.9, 1.0, 0.6], is_score=True)
    assert found.upper == 1.0
    assert 0 < found.lower < 0.6
    same = measure([1.0, 1.0, 1.0], is_score=True)
    assert (same.mean, same.upper) == (1.0, 1.0)
    assert same.lower < 0.5, "three equal scores are not certain"


def test_other_figures_that_do_not_spread_have_no_interval():
    assert measure([0.1, 0.1, 0.1], is_score=False) == Measured(0.1, 0.1, 0.1, 3)


@pytest.mark.parametrize("is_score", [False, True])
def test_one_seed_says_nothing_of_the_spread(is_score):
    assert measure([0.5], is_score=is_score) == Measured(0.5, -math.inf, math.inf, 1)
    assert measure([], is_score=is_score) is None


def test_only_finite_values_of_finished_points_count():
    [case] = sweep_of(
        result("lora", 0, {"final_loss": 2.0}),
        result("lora", 1, {"final_loss": math.nan}),
        result("lora", 2),
        lost("lora", 3, "stopped", metrics={"final_loss": 9.0}),
    ).cases
    assert case.by_seed("final_loss") == {0: 2.0}
    assert (case.seeds, [point.seed for point in case.unfinished]) == ({0, 1, 2}, [3])


def test_a_setting_is_what_differs_within_a_group():
    points = [
        result(group, seed, overrides={"adapter.method": method, "adapter.rank": rank, "run.seed": seed})
        for group, method in (("A", "lora"), ("B", "ssmlora"))
        for rank in (4, 16)
        for seed in (0, 1)
    ]
    sweep = sweep_of(*points)
    assert sweep.setting_keys == ["adapter.rank"], "the method is the group's, the seed nobody's"
    assert [(case.group, case.setting, len(case.points)) for case in sweep.cases] == [
        (group, (("adapter.rank", rank),), 2) for group in "AB" for rank in ("4", "16")
    ]


def test_a_length_is_always_a_setting():
    points = [result(f"lora-{n}", overrides={"data.max_length": n, "adapter.rank": n}) for n in (256, 512)]
    assert sweep_of(*points).setting_keys == ["data.max_length"]


def test_keys_that_repeat_another_or_never_differ_are_not_shown():
    points = [
        result("lora", overrides={"data.max_length": n, "data.train.task.lengths": [n], "model.path": "m"})
        for n in (256, 512)
    ]
    sweep = sweep_of(*points)
    assert sweep.setting_keys == ["data.max_length", "data.train.task.lengths"]
    assert sweep.shown_keys == ["data.max_length"]
    assert sweep_of(points[0]).shown_keys == []


def test_what_a_point_leaves_to_the_base():
    sweep = sweep_of(result("lora", overrides={"adapter.rank": 4}), result("lora", seed=1))
    assert [case.setting for case in sweep.cases] == [(("adapter.rank", "4"),), (("adapter.rank", UNSET),)]


def test_order_does_not_depend_on_the_rows():
    points = full_sweep()
    print(f"seed {SEED}")
    shuffled = random.Random(SEED).sample(points, len(points))
    assert sweep_of(*shuffled, baseline="ssmlora").points == sweep_of(*points, baseline="ssmlora").points
    ordered = [(case.group, case.setting[0][1]) for case in sweep_of(*points, baseline="ssmlora").cases]
    assert ordered == [(g, n) for g in ("ssmlora", "lora") for n in ("256", "256", "1024", "1024")]


@pytest.mark.parametrize("values", [[1e200, 2e200], [1.7e308] * 3, [-1e101, math.inf, math.nan]])
def test_what_no_square_can_be_taken_of_is_not_counted(values):
    points = [result("lora", seed, {"final_loss": value}) for seed, value in enumerate(values)]
    [case] = sweep_of(*points, result("lora", 9, {"final_loss": 2.0})).cases
    assert case.by_seed("final_loss") == {9: 2.0}
    assert measure(values, is_score=False) is None


def test_settings_are_text_that_a_file_can_hold():
    overrides = {"model.path": "a\ud800", "list": ["\x1b"]}
    assert [text_of(overrides, key) for key in overrides] == ["a\ufffd", '["\\u001b"]']


def test_natural_order():
    texts = ["b", "a10", "a9", "10", "9.5", "1e3", "-1", "nan"]
    assert sorted(texts, key=natural) == ["-1", "9.5", "10", "1e3", "a9", "a10", "b", "nan"]
    assert sorted(["a" + "1" * 5000, "a1"], key=natural)[0] == "a1"


def test_metrics_in_order_and_by_length():
    sweep = sweep_of(*full_sweep())
    assert sweep.metrics == [
        "final_loss",
        "validation_exact_match_after",
        "validation_exact_match_before",
        "task/keys",
        "num_ranks",
        "tokens_per_second",
        "tokens_per_second_per_device",
        "peak_memory_gib",
        "num_trainable_parameters",
    ]
    assert sweep.scores == ["validation_exact_match_after", "task/keys"]
    assert sweep.measured_by_length == ["task/keys"]


def test_scores_from_before_training_are_no_results():
    names = ("validation_exact_match_before", "validation_exact_match_before/64", "task/day_before/64")
    sweep = sweep_of(result("lora", 0, dict.fromkeys((*names, "task/day_before"), 0.5)))
    assert (sweep.scores, sweep.measured_by_length) == (["task/day_before"], ["task/day_before"])


@pytest.mark.parametrize(
    ("metric", "name", "length", "depth"),
    [
        ("final_loss", "final_loss", None, None),
        ("task/keys", "task/keys", None, None),
        ("task/keys/1024", "task/keys", 1024, None),
        ("task/keys/1024/0.25", "task/keys", 1024, 0.25),
        ("task/keys/1024/1", "task/keys", 1024, 1.0),
        ("task/512", "task/512", None, None),
        ("task/a/b/64", "task/a/b", 64, None),
        ("validation_loss_after/256", "validation_loss_after", 256, None),
        ("task/", "task/", None, None),
        # No length of an input, and no depth in it, or not as it is written.
        ("task/keys/0", "task/keys/0", None, None),
        ("task/keys/64/1.5", "task/keys/64/1.5", None, None),
        ("task/keys/64/0.0", "task/keys/64/0.0", None, None),
        (f"task/keys/{'1' * 5000}", f"task/keys/{'1' * 5000}", None, None),
    ],
)
def test_parts_of_metrics(metric, name, length, depth):
    part = part_of(metric)
    assert (part.metric, part.name, part.length, part.depth) == (metric, name, length, depth)


def test_what_an_axis_of_lengths_sets_goes_with_the_length():
    points = [
        result(
            "lora",
            overrides={
                "data.max_length": 512,
                "data.train.task.lengths": [n],
                "training.micro_batch_size": 2 if n < 512 else 1,
                "adapter.rank": rank,
            },
        )
        for n in (128, 256, 512)
        for rank in (4, 8)
    ]
    sweep = sweep_of(*points)
    assert sweep.setting_keys == [
        "data.max_length",
        "data.train.task.lengths",
        "adapter.rank",
        "training.micro_batch_size",
    ]
    assert set(sweep.setting_keys) - sweep.length_keys == {"adapter.rank"}
    assert sweep.shown_keys == ["data.train.task.lengths", "adapter.rank"]
    assert [case.length for case in sweep.cases] == [128, 128, 256, 256, 512, 512]


@pytest.mark.parametrize(
    ("value", "length"),
    [
        (512, 512),
        ([256], 256),
        ([256, 512], None),
        (True, None),
        ("512", None),
        (None, None),
        (0, None),
        (-5, None),
        (10**400, None),
    ],
)
def test_lengths(value, length):
    assert length_of(value) == length


def test_a_length_that_all_points_share():
    assert [case.length for case in sweep_of(result("lora", overrides={"data.max_length": 64})).cases] == [64]
