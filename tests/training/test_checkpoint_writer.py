"""Saving beside the training: order, waiting, and what goes wrong."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.errors import CheckpointError
from ssmlora_dist.training import checkpoint_writer
from ssmlora_dist.training.checkpoint_writer import BackgroundWriter
from ssmlora_dist.training.checkpoints import complete_checkpoints, read_checkpoint

from .checkpoint_cases import ADAPTER, BASE, checkpoint, same

LONG_SECONDS = 10.0


def writer(directory: Path, warnings: list[str] | None = None, **settings: Any) -> BackgroundWriter:
    settings = {"keep": 2, "keep_best": False} | settings
    warn = [].append if warnings is None else warnings.append
    return BackgroundWriter(directory, ADAPTER, BASE, warn=warn, **settings)


def test_checkpoints_come_in_order_and_old_ones_go(tmp_path: Path) -> None:
    written: list[Path] = []
    background = writer(tmp_path, keep=2, keep_best=True, on_written=written.append)
    assert background.wait()
    assert background.last_good is None
    for step, loss in ((10, 0.1), (20, 0.2), (30, 0.3), (40, None)):
        background.save(checkpoint(step, validation_loss=loss))
    assert background.wait()
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step-00000040",
        "step-00000030",
        "step-00000010",
    ]
    assert background.last_good == tmp_path / "step-00000040"
    assert written == [tmp_path / f"step-000000{step}" for step in (10, 20, 30, 40)]
    assert same(read_checkpoint(background.last_good), checkpoint(40))
    assert background.last_error is None


def test_training_waits_for_no_more_than_the_save_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    at_once, most = [0], [0]
    lock = threading.Lock()
    write = checkpoint_writer.write_checkpoint

    def slow(*arguments: Any) -> Path:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        assert may_write.wait(LONG_SECONDS)
        path = write(*arguments)
        with lock:
            at_once[0] -= 1
        return path

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", slow)
    background = writer(tmp_path)
    background.save(checkpoint(10))
    assert not background.wait(timeout_seconds=0.05)
    assert background.last_good is None
    second = threading.Thread(target=background.save, args=(checkpoint(20),))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    may_write.set()
    second.join(LONG_SECONDS)
    assert background.wait(LONG_SECONDS)
    assert background.last_good == tmp_path / "step-00000020"
    assert most == [1]


@pytest.mark.parametrize("error", [CheckpointError("place: disk full; free some"), ValueError("not JSON")])
def test_a_save_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    warnings: list[str] = []
    background = writer(tmp_path, warnings)
    write = checkpoint_writer.write_checkpoint

    def fail(*arguments: Any) -> Path:
        raise error

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", fail)
    background.save(checkpoint(10))
    background.wait()
    assert warnings == [f"checkpoint of step 10: {error}; training goes on, there is none before it"]
    assert (background.last_good, background.last_error) == (None, str(error))

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", write)
    background.save(checkpoint(20))
    background.wait()
    assert (background.last_good, background.last_error) == (tmp_path / "step-00000020", None)

    monkeypatch.setattr(checkpoint_writer, "write_checkpoint", fail)
    background.save(checkpoint(30))
    background.wait()
    assert warnings[1].endswith(f"training goes on, the last good one is {tmp_path / 'step-00000020'}")
    assert background.last_good == tmp_path / "step-00000020"
    assert len(warnings) == 2


def test_progress_that_is_no_json_is_told_of(tmp_path: Path) -> None:
    warnings: list[str] = []
    background = writer(tmp_path, warnings)
    background.save(checkpoint(10, progress={"loss": float("nan")}))
    background.wait()
    assert len(warnings) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_continued_run_knows_where_it_came_from(tmp_path: Path) -> None:
    assert writer(tmp_path, last_good=tmp_path / "step-00000010").last_good == tmp_path / "step-00000010"
