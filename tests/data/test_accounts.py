"""Accounts of a source: what they add up to, what they say, and when they warn."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from ssmlora_dist.data.accounts import DatasetReport

FULL = DatasetReport(
    num_rows=60,
    num_examples=44,
    num_dropped_too_long=9,
    num_truncated=5,
    num_without_target=2,
    num_answers_too_long=3,
    num_split=2,
    num_pieces=7,
    unused_fields={"id": 60, "history": 12},
)


def test_sums():
    assert DatasetReport() + FULL == FULL
    assert asdict(FULL + FULL) == {
        **{name: 2 * count for name, count in FULL.counts().items()},
        "unused_fields": {"id": 120, "history": 24},
    }
    assert set(FULL.counts()) == set(asdict(FULL)) - {"unused_fields"}


def test_lines():
    assert DatasetReport(4, 4).lines() == ["4 examples of 4 rows"]
    assert FULL.lines() == [
        "44 examples of 60 rows; left out: 9 longer than max_length, 3 with an answer that alone is longer "
        "than max_length, 2 without an answer; 5 cut in the middle of the prompt; "
        "2 texts split into 7 pieces",
        "fields not used: id, history (in 12 of 60 records)",
    ]


def test_many_unused_fields_are_one_line():
    report = DatasetReport(9, 9, unused_fields={f"f{i:02}": 9 for i in range(30)})
    _, line = report.lines()
    assert line.startswith("fields not used: f00, f01, ")
    assert line.endswith("f11, and 18 more")


@pytest.mark.parametrize(
    ("report", "says"),
    [
        (DatasetReport(10, 9, num_dropped_too_long=1), None),
        (DatasetReport(0, 0), None),
        (DatasetReport(10, 10, num_truncated=10), None),
        (
            DatasetReport(10, 1, num_dropped_too_long=9),
            "9 of 10 rows are left out: 9 longer than max_length; raise `data.max_length` or set "
            "`data.too_long` to 'truncate'",
        ),
        (
            DatasetReport(9, 7, num_without_target=1, num_answers_too_long=1),
            "2 of 9 rows are left out: 1 with an answer that alone is longer than max_length, 1 without an "
            "answer; raise `data.max_length`, and check `fields` and `answer`",
        ),
        # Nine texts are empty, and the tenth is long.
        (
            DatasetReport(10, 100, num_without_target=9, num_split=1, num_pieces=100),
            "9 of 10 rows are left out: 9 without an answer; check `fields` and `answer`",
        ),
    ],
)
def test_warnings(report, says):
    assert report.warning() == says
