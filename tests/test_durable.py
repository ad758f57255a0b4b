"""Files are replaced as a whole: what a failure or a kill leaves behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ssmlora_dist.durable import explained, replacing, write_tensors, write_text
from ssmlora_dist.errors import CheckpointError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "settings.json"
    path.write_text("old")
    return path


def partial_files(path: Path) -> list[Path]:
    return [other for other in path.parent.iterdir() if other != path]


@pytest.mark.parametrize("exists", [False, True])
def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "settings.json"
    if exists:
        path.write_text("old")
    write_text(path, "neu: ä")
    assert path.read_bytes() == "neu: ä".encode()
    assert partial_files(path) == []


def test_the_old_content_is_there_until_the_end(target: Path) -> None:
    with replacing(target) as beside:
        beside.write_text("new")
        assert beside.parent == target.parent
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_a_failure_leaves_the_old_content_and_nothing_else(target: Path) -> None:
    def write_half() -> None:
        with replacing(target) as beside:
            beside.write_text("ne")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_half()
    assert target.read_text() == "old"
    assert partial_files(target) == []


def test_a_kill_while_writing_leaves_the_old_content(target: Path) -> None:
    manager = replacing(target)
    beside = manager.__enter__()
    beside.write_text("ne")
    # A killed process runs no more of `replacing`: what the disk holds now is what it leaves.
    assert target.read_text() == "old"
    assert [path.name.endswith(".partial") for path in partial_files(target)] == [True]
    write_text(target, "new")
    assert target.read_text() == "new"


def test_content_is_on_disk_before_the_name_points_to_it(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("sync directory" if is_directory else "sync content")
        fsync(descriptor)

    def recording_replace(source: Any, destination: Any) -> None:
        calls.append("replace")
        replace(source, destination)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_text(target, "new")
    assert calls == ["sync content", "replace", "sync directory"]


def test_writers_of_one_file_do_not_meet(target: Path) -> None:
    with replacing(target) as first, replacing(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert partial_files(target) == []


def test_tensors_are_written_as_they_are(target: Path) -> None:
    tensors = {
        "matrix": torch.arange(6.0).reshape(2, 3).T,
        "bytes": torch.tensor([1, 255], dtype=torch.uint8),
        "half": torch.tensor([0.1], dtype=torch.bfloat16),
    }
    write_tensors(target, tensors)
    loaded = load_file(target)
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == tensors[name].dtype for name in tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert partial_files(target) == []


@explained(Path("out"), "choose another --out")
def write_below(path: Path) -> None:
    write_text(path / "settings.json", "new")


def test_what_the_file_system_refuses_has_a_remedy(target: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"^out: cannot be written: a part of this path .*; choose another --out$"
    ):
        write_below(target)
