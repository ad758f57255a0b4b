"""The accuracy study: what made-up rows with known answers decide."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import plan, repeat, table
from benchmarks.accuracy.decisions import DECIDING_TASKS, Comparison, cells, compare, decide, growth, holm
from benchmarks.accuracy.plan import FINAL_SEEDS, METHODS, START_RATES, TUNING_SEEDS
from tests.benchmarks.made_up import row, run_rows

# Numbers of tables have five to six digits.
TABLES = 1e-4


def study(**losses: float) -> list[dict[str, Any]]:
    """Final rows of all methods, of loss 1 or what is given, and a noise that the methods do not share."""
    noise = random.Random(5)
    return [
        row(method, task, seed, losses.get(method, 1.0) + 0.01 * noise.random())
        for method in METHODS
        for task in DECIDING_TASKS
        for seed in FINAL_SEEDS
    ]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {decision.name: decision.verdict for decision in decide(rows, 144)}


def test_intervals_and_p_are_those_of_student() -> None:
    """For 1, 2, 3, 4: mean 2.5, standard error 0.6455, t(3) of 97.5% 3.1824, of 95% 2.3534, of 80% 0.9785."""
    comparison = Comparison("a - b", "nats", (1.0, 2.0, 3.0, 4.0))
    error = (5 / 3 / 4) ** 0.5
    assert comparison.mean == 2.5
    assert comparison.interval == pytest.approx((2.5 - 3.1824 * error, 2.5 + 3.1824 * error), abs=TABLES)
    assert comparison.lower == pytest.approx(2.5 - 2.3534 * error, abs=TABLES)
    assert comparison.detectable == pytest.approx((2.3534 + 0.9785) * error, abs=TABLES)
    at_the_limit = Comparison("a - b", "nats", comparison.differences, margin=comparison.lower)
    assert at_the_limit.p == pytest.approx(0.05, abs=TABLES)


def test_a_pair_without_spread_is_certain() -> None:
    assert Comparison("a - b", "nats", (1.0, 1.0)).p == 0.0
    assert Comparison("a - b", "nats", (0.0, 0.0)).p == 1.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 1.0]) == pytest.approx([0.04, 0.09, 0.09, 1.0])
    assert holm([0.9, 0.8]) == [1.0, 1.0], "never above 1, and in the order of p"


def test_differences_count_for_the_first_and_are_means_over_tasks() -> None:
    rows = [
        row(method, task, seed, loss, correct=correct)
        for seed in (201, 202)
        for method, task, loss, correct in (
            ("paper", "needles", 1.0, 3),
            ("paper", "prose", 2.0, 4),
            ("lora", "needles", 1.5, 2),
            ("lora", "prose", 2.1, 4),
        )
    ]
    nats = compare(cells(rows), "paper", "lora", ("needles", "prose"), 144, "nats")
    points = compare(cells(rows), "paper", "lora", ("needles", "prose"), 144, "points")
    assert nats is not None
    assert points is not None
    assert nats.differences == pytest.approx([0.3, 0.3])
    assert points.differences == pytest.approx([10.0, 10.0])
    # All texts and seeds are alike, so all samples of them are.
    assert nats.bootstrap == pytest.approx((0.3, 0.3))
    assert points.bootstrap == pytest.approx((10.0, 10.0))


def test_a_pair_with_a_run_that_diverged_or_is_missing_is_left_out() -> None:
    rows = study()
    rows = [each for each in rows if (each["method"], each["seed"]) != ("lora", 208)]
    for each in rows:
        if (each["method"], each["seed"], each["task"]) == ("paper", 201, "prose"):
            each["loss"] = None
    found = compare(cells(rows), "paper", "lora", DECIDING_TASKS, 144, "nats")
    assert found is not None
    assert len(found.differences) == 6
    assert verdicts(rows)["H2"].endswith("(on 6 of 8 pairs)")


def test_nothing_is_decided_without_rows_and_of_one_task_set_alone() -> None:
    assert set(verdicts([]).values()) == {"not run"}
    rows = [each for each in study(paper=0.5) if each["task"] == "prose"]
    assert set(verdicts(rows).values()) == {"not run"}


def test_what_is_far_better_holds_and_what_is_far_worse_is_refuted() -> None:
    found = verdicts(study(paper=0.5, gated=1.5, probe=1.5))
    assert found == {
        # All have as many right ones: not worse, and surely so.
        "H1": "holds",
        "H2": "holds",
        "H3": "holds",
        "H4": "refuted",
        "H5": "not run",
        "H6": "refuted",
    }


def test_all_parts_of_a_hypothesis_must_hold() -> None:
    found = verdicts(study(paper=0.5, constant=0.4))
    assert found["H2"] == "holds"
    assert found["H3"] == "refuted"


def test_no_difference_is_not_decided() -> None:
    assert verdicts(study())["H2"] == "not decided"


@pytest.mark.parametrize(("worse_by", "expected"), [(0.4, "holds"), (0.6, "refuted")])
def test_half_the_insertions_may_be_half_a_point_worse(worse_by: float, expected: str) -> None:
    rows = study()
    for each in rows:
        each["accuracy"] = 0.5
        if each["method"] == "lora":
            # Between the seeds, a hundredth of a point.
            each["accuracy"] -= worse_by / 100 + 0.0001 * (each["seed"] % 2)
    assert verdicts(rows)["H1"] == expected


def test_what_one_hypothesis_alone_would_show_does_not_survive_six() -> None:
    """Eight differences whose p is 0.03: less than 0.05, and more than a sixth of it."""
    gains = (1, 1, 1, 1, 1, 1, -1.0, -0.5)
    rows = [each for each in study() if each["method"] in ("paper", "lora")]
    for each in rows:
        gain = gains[each["seed"] - FINAL_SEEDS[0]] if each["method"] == "paper" else 0.0
        each["loss"] = 1.0 - 0.1 * gain
    [found] = [decision for decision in decide(rows, 144) if decision.name == "H2"]
    assert 0.05 / 6 < found.p < 0.05
    assert found.verdict == "holds by itself, not after Holm"


def test_growth_is_the_slope_over_doublings() -> None:
    rows = [
        row(
            method,
            task,
            seed,
            1.0 - (0.1 * doublings if method == "paper" else 0.0),
            length=512 * 2**doublings,
        )
        for doublings in range(4)
        for method in ("paper", "lora")
        for task in ("needles", "tracking")
        for seed in FINAL_SEEDS
    ]
    found = growth(cells(rows), "paper", "lora", ("needles", "tracking"), (512, 1024, 2048, 4096))
    assert found is not None
    assert found.differences == pytest.approx([0.1] * 8)
    assert verdicts(rows)["H5"] == "holds"


def test_the_table_says_what_the_rows_hold(tmp_path: Path) -> None:
    rows = study(paper=0.5)
    for each in rows:
        if each["method"] == "paper":
            each |= {"loss_mean_state": each["loss"] + 0.25, "accuracy_mean_state": 0.4}
    rows[0]["loss"] = None
    for seed in TUNING_SEEDS:
        assert len(table.write(rows, tmp_path / "begun.md")) == 1, "no rate has all its seeds"
        for rate in START_RATES:
            loss = 1 + abs(rate - 0.005)
            rows += run_rows("prose", phase="tuning", method="lora", rate=rate, loss=loss, seed=seed)
    path, *pictures = table.write(rows, tmp_path / "study.md")
    assert [picture.name for picture in pictures] == ["study_rates_prose_144.png"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines()]
    by_name = {tuple(line[:2]): line for line in lines if len(line) == len(table.METHOD_COLUMNS)}
    of_paper = dict(zip(table.METHOD_COLUMNS, by_name["prose", "paper"], strict=True))
    assert of_paper["worth of the state (nats)"] == "0.2500 [0.2500, 0.2500]"
    assert of_paper["better than lora by (nats)"].startswith("+0.50")
    assert by_name["needles", "lora"][4] == "8, 1 diverged"
    decisions = [line for line in lines if len(line) == len(table.DECISION_COLUMNS)]
    assert [line[-1] for line in decisions if line[0].startswith("H5")] == ["not run"]
    assert sum(line[0].startswith("H4") for line in decisions) == 7


def test_a_repetition_agrees_by_its_bits_or_within_the_spread_of_the_seeds() -> None:
    rows = [row(seed=seed, loss=loss) for seed, loss in ((201, 1.0), (202, 1.2), (203, 1.4))]
    name = str(plan.run_of(rows[0]))
    rows += [{**each, "task": "tracking"} for each in rows]
    assert repeat.find(rows, name, Path("rows"))["needles"] is rows[0]
    assert repeat.spread(rows, rows[0]) == pytest.approx(0.2)
    assert repeat.verdict(rows[0], dict(rows[0]), 0.2) == ("the same bits", True)
    assert repeat.verdict(rows[0], {**rows[0], "loss": 1.1}, 0.2)[1]
    assert not repeat.verdict(rows[0], {**rows[0], "loss": 1.3}, 0.2)[1]
    assert not repeat.verdict(rows[0], {**rows[0], "loss": None}, 0.2)[1]
