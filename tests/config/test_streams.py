"""Output that cannot be written changes neither a command's work nor its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNWRITTEN = "warning: the output cannot be written: "

# Name -> exit code, what is said of it on the error stream where that can be written.
EXPECTED: dict[str, tuple[int, str]] = {
    "nobody reads": (0, ""),
    "nobody reads the output": (0, f"{UNWRITTEN}Broken pipe; goes on\n"),
    "nobody reads a failure": (3, ""),
    "nobody reads an interruption": (130, ""),
    "nobody reads a traceback": (1, ""),
    "nobody reads an answer": (141, ""),
    "full disk for an answer": (2, ""),
    "full disk": (0, f"{UNWRITTEN}No space left on device; goes on\n"),
    "closed terminal": (0, ""),
    "pipe that does not wait": (0, ""),
    "closed from the start": (0, ""),
    "narrow encoding": (0, ""),
}


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.config.streams_worker"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return {name: tuple(result) for name, result in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_command_outlives_its_output(name: str, found: dict[str, tuple[int, str]]) -> None:
    exit_code, said = EXPECTED[name]
    assert found[name][0] == exit_code, found[name]
    warnings = [line for line in found[name][1].splitlines(keepends=True) if line.startswith(UNWRITTEN)]
    assert "".join(warnings) == said


def test_an_answer_that_cannot_be_written_is_an_error(found: dict[str, tuple[int, str]]) -> None:
    assert found["full disk for an answer"][1].endswith(
        "error: the standard output cannot be written (No space left on device); make room there, or write "
        "elsewhere\n"
    )


def test_what_can_be_written_is_written_whole(found: dict[str, tuple[int, str]]) -> None:
    assert found["narrow encoding"][1] == "run \\u2192\n"
    slowly_read = found["pipe that does not wait"][1]
    assert slowly_read.count("printed\n") == 400
    assert slowly_read.count("a message" * 100) == 200
