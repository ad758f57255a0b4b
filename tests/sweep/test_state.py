from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from ssmlora_dist.errors import CheckpointError, DataError
from ssmlora_dist.sweep.state import Row, SweepDirectory

ROWS = [
    Row("a_seed-0", "d1", {"adapter.rank": 2}, "a", 0, "finished", None, 0, 1.5, {"final_loss": 2.0}, "id"),
    Row("b_seed-0", "d2", {}, "b", 0, "failed", "why", 3),
    Row("c_seed-0", "d3", {}, "c", 0),
]


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    found = SweepDirectory(tmp_path / "sweeps" / "one")
    with found.claimed():
        pass
    return found


def test_rows_come_back_as_they_were(directory: SweepDirectory) -> None:
    assert directory.read_rows() == {}
    directory.write_rows(ROWS)
    assert list(directory.read_rows().values()) == ROWS
    first = json.loads(directory.points_file.read_text().splitlines()[0])
    assert list(first) == [
        *("point", "digest", "overrides", "group", "seed", "outcome", "reason", "exit_code"),
        *("wall_seconds", "metrics", "mlflow_run_id"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"point": "a', "is no JSON object"),
        ("[]", "is no JSON object"),
        ('{"point": "x"}', "lacks 'digest'"),
        (
            json.dumps({**asdict(ROWS[0]), "point": "x", "outcome": "done"}),
            "outcome 'done'; allowed: finished",
        ),
        (json.dumps(asdict(ROWS[0])), "a second row of a_seed-0"),
    ],
)
def test_a_broken_row_is_named_with_its_line(directory: SweepDirectory, line: str, problem: str) -> None:
    directory.write_rows(ROWS)
    with directory.points_file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=re.escape(f"points.jsonl:4: {problem}")):
        directory.read_rows()


def test_two_sweeps_cannot_share_a_directory(directory: SweepDirectory) -> None:
    refused = pytest.raises(CheckpointError, match="another sweep is using it")
    with directory.claimed(), refused, directory.claimed():
        pass
    with directory.claimed():
        pass


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="choose another output_dir"),
        SweepDirectory(tmp_path / "file" / "sweep").claimed(),
    ):
        pass


def test_what_a_changed_point_had_is_kept_aside(directory: SweepDirectory) -> None:
    assert directory.set_aside("a") is None
    for number in (1, 2):
        (directory.runs / "a").mkdir()
        (directory.runs / "a" / "metrics.jsonl").write_text(str(number))
        directory.config("a").write_text("{}")
        assert directory.set_aside("a") == directory.aside / f"a-{number}"
        assert not (directory.runs / "a").exists()
    assert (directory.aside / "a-1" / "metrics.jsonl").read_text() == "1"
    assert (directory.aside / "a-2" / "metrics.jsonl").read_text() == "2"
    assert (directory.aside / "a-2" / "sweep_config.json").read_text() == "{}"
    directory.keep_rows(ROWS[:1])
    directory.keep_rows(ROWS[1:])
    assert len((directory.aside / "points.jsonl").read_text().splitlines()) == 3


def test_what_was_begun_outlives_a_kill(directory: SweepDirectory) -> None:
    begun = directory.begun()
    assert (begun.parent, begun.run_id("a"), begun.training_digest("a")) == (None, None, None)
    begun.parent = "p"
    begun.note("a", "d", "r")
    again = directory.begun()
    assert (again.parent, again.run_id("a"), again.training_digest("a")) == ("p", "r", "d")
