"""A kill or a full disk at any moment of writing and deleting: the checkpoints before it stay whole."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.errors import CheckpointError
from ssmlora_dist.training import checkpoints
from ssmlora_dist.training.checkpoints import (
    LATEST_FILE,
    complete_checkpoints,
    newest_checkpoint,
    prune,
    read_checkpoint,
    remove_leftovers,
)

from .checkpoint_cases import checkpoint, contents, same, write

CHANGES = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
MANY_CHANGES = 200


class Killed(BaseException):
    """Nothing of a process runs on after a kill, so nothing may catch this."""


class Disk:
    """Counts what changes the disk, and fails in place of a chosen change."""

    def __init__(self) -> None:
        self.active = False
        self.num_changes = 0
        self.fails: Callable[[int], BaseException | None] = lambda number: None

    def change(self) -> None:
        if self.active:
            self.num_changes += 1
            if error := self.fails(self.num_changes):
                raise error

    def run(self, action: Callable[[], Any], fails: Callable[[int], BaseException | None]) -> Any:
        """What `action` returns where the n-th change raises `fails(n)`."""
        self.num_changes, self.fails, self.active = 0, fails, True
        try:
            return action()
        finally:
            self.active = False

    def killed(self, action: Callable[[], Any], number: int) -> bool:
        """Whether `action` was killed before its change of that number, and did not end before."""
        try:
            self.run(action, lambda change: Killed() if change >= number else None)
        except Killed:
            return True
        return False


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    counting = Disk()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            counting.change()
            return function(*arguments, **options)

        return call

    open_file = io.open

    def counted_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            counting.change()
        return open_file(file, mode, *arguments, **options)

    for name in CHANGES:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(io, "open", counted_open)
    return counting


def save(directory: Path, step: int, **changes: Any) -> None:
    """What a run does at a save."""
    path = write(directory, step, **changes)
    prune(directory, path, keep=1, keep_best=True)


def newest_name(directory: Path) -> str | None:
    def no_warning(message: str) -> None:
        raise AssertionError(f"unexpected warning: {message}")

    found = newest_checkpoint(directory, no_warning)
    return found and found[0].name


def prepared(directory: Path) -> Path:
    """Two checkpoints, the older one the best."""
    write(directory, 10, validation_loss=0.5)
    write(directory, 20, validation_loss=1.0)
    return directory


@pytest.mark.parametrize(
    ("step", "loss"),
    [(30, 0.25), (30, 2.0), (20, 0.25), (15, None)],
    ids=["next_best", "next", "same_step", "gone_back"],
)
def test_a_kill_at_any_change_of_the_disk(tmp_path: Path, disk: Disk, step: int, loss: float | None) -> None:
    original, directory = prepared(tmp_path / "original"), tmp_path / "checkpoints"
    before, new = checkpoint(20, validation_loss=1.0), checkpoint(step, validation_loss=loss)
    for number in range(1, MANY_CHANGES):
        shutil.copytree(original, directory)
        killed = disk.killed(partial(save, directory, step, validation_loss=loss), number)
        # Every name is that of a whole checkpoint, `latest` is one of them, and the one before stays until
        # the new one is there.
        found = {path.name: read_checkpoint(path) for path in complete_checkpoints(directory)}
        assert (directory / LATEST_FILE).read_text().strip() in found
        has_new = any(same(one, new) for one in found.values())
        assert has_new or (killed and same(found["step-00000020"], before))
        # The next start tidies up, and goes on from what it would have gone on from.
        newest = newest_name(directory)
        remove_leftovers(directory)
        assert {entry.name for entry in directory.iterdir()} == {LATEST_FILE, *found}
        assert newest_name(directory) == newest
        shutil.rmtree(directory)
        if not killed:
            break
    print(f"killed at each of {number - 1} changes")
    assert 30 < number < MANY_CHANGES - 1


def test_a_kill_in_the_first_save_leaves_nothing_to_go_on_from(tmp_path: Path, disk: Disk) -> None:
    directory = tmp_path / "checkpoints"
    names = []
    for number in range(1, MANY_CHANGES):
        killed = disk.killed(partial(save, directory, 10), number)
        names.append(newest_name(directory))
        shutil.rmtree(directory, ignore_errors=True)
        if not killed:
            break
    first = names.index("step-00000010")
    assert names == [None] * first + ["step-00000010"] * (len(names) - first)
    assert 20 < first < MANY_CHANGES - 1


def test_a_kill_while_tidying_up(tmp_path: Path, disk: Disk) -> None:
    original, directory = prepared(tmp_path / "original"), tmp_path / "checkpoints"
    for name in (".step-00000030.ab12.partial", ".step-00000005.cd34.removed"):
        shutil.copytree(original / "step-00000010", original / name)
    for number in range(1, MANY_CHANGES):
        shutil.copytree(original, directory)
        killed = disk.killed(partial(remove_leftovers, directory), number)
        assert newest_name(directory) == "step-00000020"
        shutil.rmtree(directory)
        if not killed:
            break
    assert 10 < number < MANY_CHANGES - 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_an_error_of_the_disk_at_any_change(tmp_path: Path, disk: Disk, number: int) -> None:
    """Unlike a kill it leaves the process alive: what was begun is cleared away at once."""
    directory = prepared(tmp_path / "checkpoints")
    before = contents(directory)

    def attempt() -> CheckpointError | None:
        try:
            write(directory, 30)
        except CheckpointError as error:
            return error
        return None

    def fails_once(at: int, change: int) -> OSError | None:
        return OSError(number, os.strerror(number)) if change == at else None

    num_errors = 0
    for fail_at in range(1, MANY_CHANGES):
        error = disk.run(attempt, partial(fails_once, fail_at))
        if error is not None:
            num_errors += 1
            assert str(error).startswith(f"{directory}: cannot be written: ")
            assert "choose another run.output_dir" in str(error)
        path = directory / "step-00000030"
        # Where nothing failed, or `latest` alone, the new one is whole.
        if path.exists():
            assert same(read_checkpoint(path), checkpoint(30))
            shutil.rmtree(path)
            (directory / LATEST_FILE).write_bytes(before[LATEST_FILE])
        assert contents(directory) == before
        if disk.num_changes < fail_at:
            break
    assert error is None
    assert 20 < num_errors < MANY_CHANGES - 1


def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file system, where one can be mounted."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(CheckpointError, match=r"needs 1\.0 MiB, 0\.1 MiB are free"):
            write(directory, 0)
        # Without that check, which finds too little space at once.
        monkeypatch.setattr(checkpoints, "SPARE_BYTES", -(2**30))
        error, steps = None, []
        while error is None and len(steps) < 50:
            try:
                write(directory, len(steps))
                steps.append(len(steps))
            except CheckpointError as caught:
                error = caught
        assert "no space left on the device; free some or choose another" in str(error)
        names = [f"step-{step:08d}" for step in steps]
        assert names
        assert {entry.name for entry in directory.iterdir()} == {LATEST_FILE, *names}
        assert all(same(read_checkpoint(directory / names[step]), checkpoint(step)) for step in steps)
        assert (directory / LATEST_FILE).read_text() == f"{names[-1]}\n"
    finally:
        subprocess.run(["umount", str(directory)], check=True)
