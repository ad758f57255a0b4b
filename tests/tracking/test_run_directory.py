from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmlora_dist.errors import CheckpointError
from ssmlora_dist.tracking import RunDirectory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_a_new_directory_and_its_records(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs" / "first")
    run.write_config({"run": {"name": "first", "output_dir": Path("runs")}, "betas": (0.9, 0.999)})
    run.append_metrics({"step": 1, "loss": 2.5})
    run.append_metrics({"step": 2, "loss": 2.25})
    run.write_summary({"loss_last": 2.25})
    assert json.loads(run.config_file.read_text()) == {
        "run": {"name": "first", "output_dir": "runs"},
        "betas": [0.9, 0.999],
    }
    assert run.metrics_file.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n'
    assert run.read_metrics() == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    assert json.loads(run.summary_file.read_text()) == {"loss_last": 2.25}
    assert {path.name for path in run.path.iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "summary.json",
    }


def test_an_existing_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.write_config({"a": 1})
    run.append_metrics({"step": 1})
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        RunDirectory.create(tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'run'}: holds a run already")
    assert "another run.name" in message
    assert "--resume" in message
    assert caught.value.exit_code == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_of_something_else_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds no run .*choose another run\.name"):
        RunDirectory.create(tmp_path, resume=resume)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path).read_metrics() == []


def test_of_two_runs_that_start_at_once_one_gets_the_directory(tmp_path: Path) -> None:
    outcomes: list[bool] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            RunDirectory.create(tmp_path / "run")
            outcomes.append(True)
        except CheckpointError:
            outcomes.append(False)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


def test_a_continued_run_goes_on_after_its_last_whole_row_and_keeps_its_configuration(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path / "run", resume=True)
    first.write_config({"max_steps": 1})
    first.append_metrics({"step": 1})
    with first.metrics_file.open("a") as file:
        file.write('{"step": 2, "lo')
    first.release()

    second = RunDirectory.create(tmp_path / "run", resume=True)
    assert second.write_config({"max_steps": 1}) == second.config_file
    assert second.write_config({"max_steps": 2}) == tmp_path / "run" / "config-2.json"
    assert second.write_config({"max_steps": 2}) == tmp_path / "run" / "config-2.json"
    second.append_metrics({"step": 2})
    assert second.read_metrics() == [{"step": 1}, {"step": 2}]
    assert json.loads(second.config_file.read_text()) == {"max_steps": 1}


HOLDER = """
import sys, time
from pathlib import Path
from ssmlora_dist.tracking import RunDirectory

directory = RunDirectory.create(Path(sys.argv[1]), resume=True)
print("claimed", flush=True)
time.sleep(60)
"""


def test_a_run_that_another_process_is_at_is_left_alone_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with (path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "lo')
        before = contents(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            RunDirectory.create(path, resume=True)
        assert str(caught.value).startswith(f"{path}: another run is using it (process {other.pid} on ")
        assert socket.gethostname() in str(caught.value)
        assert str(caught.value).endswith("wait until it has ended or stop it, or choose another run.name")
        assert caught.value.exit_code == 2
        assert contents(tmp_path) == before
        other.kill()
        other.wait()
        continued = RunDirectory.create(path, resume=True)
    assert continued.read_metrics() == []
    assert f"process {os.getpid()} on" in (path / ".lock").read_text()


def test_a_directory_is_used_until_it_is_released_or_collected(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="another run is using it"):
            RunDirectory.create(tmp_path / "run", resume=True)
    first.release()
    first.release()
    second = RunDirectory.create(tmp_path / "run", resume=True)
    del second
    assert RunDirectory.create(tmp_path / "run", resume=True).read_metrics() == []


def test_a_kill_between_lock_and_claim_does_not_block_the_next_run(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 1 on nowhere\n")
    RunDirectory.check_free(tmp_path)
    assert RunDirectory.create(tmp_path).read_metrics() == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(file: Any, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert RunDirectory.create(tmp_path / "run").read_metrics() == []


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    row = {
        "loss": math.nan,
        "norm": -math.inf,
        "nested": {"values": [1.0, math.inf]},
        "tensor": torch.tensor(0.5),
        "bad tensor": torch.tensor(math.nan),
        "flag": True,
    }
    run.append_metrics(row)
    run.write_summary(row)
    expected = {
        "loss": None,
        "norm": None,
        "nested": {"values": [1.0, None]},
        "tensor": 0.5,
        "bad tensor": None,
        "flag": True,
    }
    assert run.read_metrics() == [expected]
    assert json.loads(run.summary_file.read_text()) == expected


def test_a_summary_that_fails_half_way_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory.create(tmp_path)
    run.write_summary({"attempt": 1})
    before = contents(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"summary\.json: cannot be written: no space left"):
        run.write_summary({"attempt": 2})
    assert contents(tmp_path) == before


def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        CheckpointError, match=r"metrics\.jsonl: cannot be written: no space left on the device"
    ):
        RunDirectory(tmp_path).append_metrics({"step": 1})


def test_a_line_that_the_disk_does_not_take_is_written_before_the_next(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    run.append_metrics({"step": 1})
    size = run.metrics_file.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # So small that half of a line finds a place.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        for step in (2, 3):
            with pytest.raises(CheckpointError, match="a file would be larger than is allowed"):
                run.append_metrics({"step": step})
            assert run.metrics_file.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.append_metrics({"step": 4})
    assert [row["step"] for row in run.read_metrics()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "no permission to write; change its permissions or choose another run.output_dir"),
        (errno.EROFS, "the file system is read-only; choose another run.output_dir"),
        (errno.ENOSPC, "no space left on the device; free some or choose another run.output_dir"),
        (errno.EIO, f"{os.strerror(errno.EIO)}; choose another run.output_dir"),
    ],
)
def test_a_place_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError) as caught:
        RunDirectory.create(tmp_path / "run")
    assert str(caught.value) == f"{tmp_path / 'run'}: cannot be written: {words}"


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    for path in (tmp_path / "runs", tmp_path / "runs" / "first"):
        with pytest.raises(CheckpointError, match="a part of this path is a file, not a directory"):
            RunDirectory.create(path)
