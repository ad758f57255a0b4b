"""Paired differences against scipy; rows by length; efficiency by hand."""

from __future__ import annotations

import math
import random

import pytest

from ssmlora_dist.sweep.aggregate import (
    by_depth,
    by_input_length,
    by_training_length,
    differences,
    efficiencies,
    label_of,
)
from tests.sweep.results import full_sweep, lost, result, sweep_of

SEED = 13
# Both sides are float64 with a root or an inverse in them.
ROUNDING = 1e-9


def test_paired_differences_as_scipy_has_them():
    stats = pytest.importorskip("scipy.stats")
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for count in (2, 3, 8):
        pairs = [(rng.gauss(2, 1), rng.gauss(2.2, 1)) for _ in range(count)]
        points = [result("B", seed, {"final_loss": ours}) for seed, (ours, _) in enumerate(pairs)]
        points += [result("A", seed, {"final_loss": base}) for seed, (_, base) in enumerate(pairs)]
        [found] = differences(sweep_of(*points, baseline="A"))
        test = stats.ttest_rel(*zip(*pairs, strict=True))
        low, high = test.confidence_interval(0.95)
        difference = found.metrics["final_loss"]
        mean = sum(ours - base for ours, base in pairs) / count
        expected = (mean, low, high)
        assert (difference.mean, difference.lower, difference.upper) == pytest.approx(expected, rel=ROUNDING)
        assert difference.count == count


def test_pairs_have_one_seed_and_one_setting():
    points = [
        result(group, seed, {"final_loss": loss + rank}, {"adapter.rank": rank})
        for group, loss in (("base", 1.0), ("ours", 0.5))
        for rank in (4, 8)
        for seed in (0, 1)
    ]
    points += [
        lost("base", 2, overrides={"adapter.rank": 4}),
        result("ours", 2, {"final_loss": 99.0}, {"adapter.rank": 4}),
        result("ours", 0, {"final_loss": 1.0}, {"adapter.rank": 16}),
    ]
    found = differences(sweep_of(*points, baseline="base"))
    assert [(one.case.setting[0][1], one.reference is None) for one in found] == [
        ("4", False),
        ("8", False),
        ("16", True),
    ]
    assert [one.metrics["final_loss"].mean for one in found[:2]] == [-0.5, -0.5]
    assert [one.metrics["final_loss"].count for one in found[:2]] == [2, 2]
    assert found[2].metrics == {}


def test_a_length_is_compared_with_the_same_length_alone():
    points = [
        result(f"{method}-{length}", 0, {"final_loss": 1.0}, {"data.max_length": length})
        for method in ("lora", "ssmlora")
        for length in (256, 512)
    ]
    found = {one.case.group: one.reference for one in differences(sweep_of(*points, baseline="lora-256"))}
    assert {group: reference is not None for group, reference in found.items()} == {
        "lora-512": False,
        "ssmlora-256": True,
        "ssmlora-512": False,
    }


def test_one_pair_has_no_interval():
    points = [result(group, 0, {"final_loss": 1.0}) for group in "AB"]
    [found] = differences(sweep_of(*points, baseline="A"))
    assert (found.metrics["final_loss"].lower, found.metrics["final_loss"].upper) == (-math.inf, math.inf)


def test_no_baseline_no_differences():
    assert differences(sweep_of(*full_sweep())) == []


def test_rows_by_length():
    rows = by_input_length(sweep_of(*full_sweep()), "task/keys")
    assert [(row.group, row.setting, sorted(row.cells)) for row in rows] == [
        ("lora", (("launcher.ranks", "1"),), [256]),
        ("lora", (("launcher.ranks", "2"),), [256, 1024]),
        ("ssmlora", (("launcher.ranks", "1"),), [256, 1024]),
        ("ssmlora", (("launcher.ranks", "2"),), [256, 1024]),
    ]
    assert rows[1].cells[1024].mean == pytest.approx(0.62)
    assert len(rows[0].cases[1].unfinished) == 3, "what ran out of memory stays in its row"


def test_rows_are_apart_where_two_lengths_of_training_answer_one_length():
    points = [
        result("lora", 0, {f"task/keys/{asked}": 0.5 for asked in (64, 128)}, {"data.max_length": length})
        for length in (256, 512)
    ]
    rows = by_input_length(sweep_of(*points), "task/keys")
    assert [(row.setting[0][1], sorted(row.cells)) for row in rows] == [
        ("256", [64, 128]),
        ("512", [64, 128]),
    ]


def test_rows_by_depth():
    row = by_depth(sweep_of(*full_sweep()), "task/keys")[1]
    assert {place: round(found.mean, 6) for place, found in row.cells.items()} == {
        (256, 0.0): 0.7,
        (256, 0.5): 0.5,
        (1024, 0.0): 0.7,
        (1024, 0.5): 0.5,
    }


def test_rows_by_training_length():
    rows = by_training_length(
        sweep_of(*full_sweep(), result("plain", 0, {"peak_memory_gib": 3.0})), "peak_memory_gib"
    )
    assert [{length: found.mean for length, found in row.cells.items()} for row in rows] == [
        {256: 0.5},
        {256: 0.5, 1024: 2.0},
        {None: 3.0},
        {256: 0.5, 1024: 2.0},
        {256: 0.5, 1024: 2.0},
    ]


def test_efficiency_is_relative_to_the_smallest_that_finished():
    found = efficiencies(sweep_of(*full_sweep()))
    assert [(one.workload, one.topology, one.num_devices, one.is_reference) for one in found] == [
        ("lora, max_length=256", "ranks=1", 1, True),
        ("lora, max_length=256", "ranks=2", 2, False),
        ("lora, max_length=1024", "ranks=1", None, False),
        ("lora, max_length=1024", "ranks=2", 2, True),
        ("ssmlora, max_length=256", "ranks=1", 1, True),
        ("ssmlora, max_length=256", "ranks=2", 2, False),
        ("ssmlora, max_length=1024", "ranks=1", 1, True),
        ("ssmlora, max_length=1024", "ranks=2", 2, False),
    ]
    # 936 - seed on one device, 836 - seed on each of two.
    assert found[1].relative.mean == pytest.approx(sum((836 - s) / (936 - s) for s in range(3)) / 3)
    assert (found[1].relative.count, found[0].relative.mean) == (3, 1.0)
    assert found[2].relative is None


def test_groups_may_be_the_topologies():
    points = [
        result(
            f"zero{stage}", 0, {"tokens_per_second": 10.0, "tokens_per_second_per_device": rate}, overrides
        )
        for stage, rate, overrides in (
            (0, 10.0, {"parallel.zero_stage": 0, "training.global_batch_size": 8}),
            (1, 5.0, {"parallel.zero_stage": 1, "training.global_batch_size": 16}),
        )
    ]
    found = efficiencies(sweep_of(*points))
    assert [(one.workload, one.topology, one.num_devices, one.relative.mean) for one in found] == [
        ("all groups", "zero_stage=0, global_batch_size=8", 1, 1.0),
        ("all groups", "zero_stage=1, global_batch_size=16", 2, 0.5),
    ]


def test_no_efficiency_of_one_topology():
    assert efficiencies(sweep_of(result("lora", 0, {"tokens_per_second_per_device": 1.0}))) == []


def test_labels():
    assert label_of("lora", (("adapter.rank", "8"), ("data.max_length", "as base"))) == "lora, rank=8"
