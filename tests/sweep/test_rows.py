"""Every line of points.jsonl is a point or a broken row that says what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.sweep.rows import read_rows
from tests.sweep.results import lost, result, row_of, write_rows

GOOD = row_of(result("lora", 3, {"final_loss": 2.5}, {"adapter.rank": 8}, wall_seconds=12.5))


def test_points_come_back_as_they_were(tmp_path: Path) -> None:
    points = [
        result("lora", 3, {"final_loss": 2.5}, {"adapter.rank": 8}, wall_seconds=12.5),
        lost("lora", 4),
        lost("ssmlora", 4, "not_run", reason=None),
    ]
    path = write_rows(tmp_path / "points.jsonl", [points[0], "", *points[1:]])
    assert read_rows(path) == (points, [])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"point": "half', "no JSON (Unterminated string"),
        ("[" * 5000, "no JSON ("),
        ("[1, 2]", "needed: a JSON object; given: [1, 2]"),
        (json.dumps({**GOOD, "seed": None}), "seed: null; allowed: a whole number"),
        ('{"point": "a", "outcome": "failed", "grup": "b"}', "no 'group' (nearest: grup); it has: point, ou"),
        (json.dumps({**GOOD, "seed": "3"}), 'seed: "3"; allowed: a whole number'),
        (json.dumps({**GOOD, "seed": True}), "seed: true; allowed: a whole number"),
        (json.dumps({**GOOD, "point": ""}), "point: is empty; allowed: a name"),
        (json.dumps({**GOOD, "group": 7}), "group: 7; allowed: a text"),
        (json.dumps({**GOOD, "outcome": "finishd"}), '"finishd" (nearest: finished); allowed: finished, fa'),
        (json.dumps({**GOOD, "overrides": []}), "overrides: []; allowed: an object"),
        (json.dumps({**GOOD, "metrics": {"final_loss": "low"}}), 'metrics.final_loss: "low"; allowed: a num'),
        (
            json.dumps({**GOOD, "metrics": {"task/keys": 37.5}}),
            "metrics.task/keys: 37.5; allowed: a score fr",
        ),
        (json.dumps({**GOOD, "metrics": {"task/keys": 10**400}}), "allowed: a score from 0 to 1"),
        (json.dumps({**GOOD, "wall_seconds": "long"}), 'wall_seconds: "long"; allowed: a number'),
        (json.dumps(GOOD), "point 'lora-8-seed3' is in line 1 already; names are unique"),
    ],
)
def test_broken_rows(line: str, problem: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "points.jsonl", [GOOD, line, lost("ssmlora")])
    points, [broken] = read_rows(path)
    assert [point.name for point in points] == ["lora-8-seed3", "ssmlora-seed0"]
    assert broken.line == 2
    assert problem in broken.problem


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_bytes(b'{"point": "\xff"}\r\n' + json.dumps(GOOD).encode())
    points, [broken] = read_rows(path)
    assert (broken.line, broken.problem, len(points)) == (1, "no UTF-8 text", 1)


def test_text_that_no_file_can_hold_is_replaced(tmp_path: Path) -> None:
    row = {**GOOD, "group": "a\ud800\x00b", "outcome": "failed", "reason": "one\n\tline\x1b[0m"}
    [point], _ = read_rows(write_rows(tmp_path / "points.jsonl", [row]))
    assert (point.group, point.reason) == ("a\ufffd\ufffdb", "one line\ufffd[0m")


def test_metrics_that_say_nothing(tmp_path: Path) -> None:
    metrics = {"final_loss": float("nan"), "task/keys": None, "tokens_per_second": 10**400}
    [point], broken = read_rows(write_rows(tmp_path / "points.jsonl", [{**GOOD, "metrics": metrics}]))
    assert {name: str(value) for name, value in point.metrics.items()} == {
        "final_loss": "nan",
        "tokens_per_second": "inf",
    }
    assert broken == []


def test_a_time_that_is_too_long_for_a_float(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "points.jsonl", [{**GOOD, "wall_seconds": 10**400}])
    assert read_rows(path)[0][0].wall_seconds == math.inf


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"points.jsonl: cannot be read .*; name a sweep directory"):
        read_rows(tmp_path / "points.jsonl")
