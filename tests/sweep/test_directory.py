from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from ssmlora_dist.errors import CheckpointError, DataError
from ssmlora_dist.sweep.directory import Row, SweepDirectory

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
        ('{"point": "a', "Invalid JSON: EOF"),
        ("[]", "[] given; input should be an object"),
        ('{"point": "x"}', "digest: Field required (and 3 more)"),
        (
            json.dumps({**asdict(ROWS[0]), "point": "x", "outcome": "done"}),
            "outcome: \"done\" given; input should be 'finished'",
        ),
        (json.dumps({**asdict(ROWS[0]), "point": "x", "metrics": 3}), "metrics: 3 given; input should be"),
        (json.dumps({**asdict(ROWS[0]), "point": "x", "wall_seconds": "1"}), 'wall_seconds: "1" given'),
        (json.dumps(asdict(ROWS[0])), "a second row of a_seed-0"),
    ],
)
def test_a_broken_row_is_named_with_its_line(directory: SweepDirectory, line: str, problem: str) -> None:
    directory.write_rows(ROWS)
    with directory.points_file.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=re.escape(f"line 4: {problem}")):
        directory.read_rows()


def test_all_broken_rows_are_named_at_once_and_nothing_is_changed(directory: SweepDirectory) -> None:
    directory.write_rows(ROWS)
    whole = directory.points_file.read_bytes()
    content = b"\xff\xfe\n\n" + whole + b"{}\n"
    directory.points_file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        directory.read_rows()
    heading, first, last = str(caught.value).splitlines()
    assert "points.jsonl: 2 broken rows; mend or remove" in heading
    assert first.startswith("  line 1: ")
    assert last.startswith("  line 6: ")
    assert directory.points_file.read_bytes() == content


@pytest.mark.parametrize("content", ["", "[]", '{"parent": 3, "points": {}}', '{"parent": null}'])
def test_a_broken_file_of_what_was_begun_is_named(directory: SweepDirectory, content: str) -> None:
    directory.started_file.write_text(content)
    with pytest.raises(DataError, match=r"begun\.json: .*; remove it"):
        directory.started_runs()


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
    started = directory.started_runs()
    assert (started.parent, started.run_id("a"), started.training_digest("a")) == (None, None, None)
    started.parent = "p"
    started.note("a", "d", "r")
    again = directory.started_runs()
    assert (again.parent, again.run_id("a"), again.training_digest("a")) == ("p", "r", "d")
    assert again.open_runs() == {"a": "r"}
    again.note_end("a")
    assert directory.started_runs().open_runs() == {}
