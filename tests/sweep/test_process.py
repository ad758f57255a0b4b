from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from ssmlora_dist.sweep import process
from ssmlora_dist.sweep.outcome import outcome_of
from ssmlora_dist.sweep.process import PointProcess, visible_devices


@pytest.mark.parametrize(
    ("variable", "num_devices", "names"),
    [
        (None, 2, ["0", "1"]),
        ("", 0, []),
        ("3,5", 2, ["3", "5"]),
        (" 3, 5", 2, ["3", "5"]),
        # CUDA reads up to the first that it does not know.
        ("3,-1,5", 1, ["3"]),
        ("GPU-1a,GPU-2b", 2, ["GPU-1a", "GPU-2b"]),
    ],
)
def test_devices_are_called_as_the_variable_calls_them(
    variable: str | None, num_devices: int, names: list[str]
) -> None:
    assert visible_devices(variable, num_devices) == names


def ended(started: PointProcess) -> int:
    deadline = time.monotonic() + 60
    while (code := started.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return code


def test_what_cannot_be_started_has_failed(tmp_path: Path) -> None:
    started = PointProcess([str(tmp_path / "nowhere")], {}, tmp_path / "log", 1.0)
    code = ended(started)
    started.stop()
    assert outcome_of(code, started.written()) == (
        "failed",
        f"cannot be started: [Errno 2] No such file or directory: '{tmp_path / 'nowhere'}' (exit code 126)",
    )


def test_the_kernel_s_count_tells_who_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = tmp_path / "vmstat"
    monkeypatch.setattr(process, "_KERNEL_COUNTS", counts)
    counts.write_text("nr_free_pages 1\noom_kill 4\n")
    started = PointProcess(
        [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {}, tmp_path / "log", 1
    )
    assert ended(started) == -9
    assert started.kernel_killed is False
    counts.write_text("nr_free_pages 1\noom_kill 5\n")
    assert started.kernel_killed is True
    counts.unlink()
    assert started.kernel_killed is None
