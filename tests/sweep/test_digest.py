"""What a digest changes with; see test_plan.py for the configuration's part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.sweep import digest as module

from .sweeps import plan_of


def digest(directory: Path, tasks: list[dict[str, Any]] | None = None) -> str:
    source = {"format": "text", "path": str(directory / "*.jsonl")}
    overrides: dict[str, Any] = {"data.train": source}
    if tasks is not None:
        overrides["evaluation.tasks"] = tasks
    plan = plan_of(
        directory, grid={"adapter.rank": [2]}, overrides=overrides, evaluate_tasks=tasks is not None
    )
    return plan.points[0].digest


def write(file: Path, text: str) -> None:
    file.write_text(json.dumps({"text": text}) + "\n")


def test_the_contents_of_data_files_belong_to_it(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", "some words")
    before = digest(tmp_path)
    os.utime(tmp_path / "one.jsonl", (0, 0))
    assert digest(tmp_path) == before
    write(tmp_path / "one.jsonl", "same words")
    changed = digest(tmp_path)
    assert changed != before
    write(tmp_path / "two.jsonl", "more")
    assert digest(tmp_path) not in (before, changed)


def test_the_files_of_tasks_belong_to_their_part(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", "some words")
    background = tmp_path / "background.txt"
    background.write_text("noise")
    tasks = [{"task": "passkey", "background": str(background)}]
    before = digest(tmp_path, tasks)
    background.write_text("other")
    after = digest(tmp_path, tasks)
    assert after != before
    assert after.partition("+")[0] == before.partition("+")[0] == digest(tmp_path)


def test_of_a_large_file_samples_belong_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WHOLE_BYTES", 10), ("NUM_SAMPLES", 3), ("SAMPLE_BYTES", 4)):
        monkeypatch.setattr(module, name, value)
    file = tmp_path / "large"

    def content(text: str) -> str:
        file.write_text(text)
        module._content.cache_clear()
        return module._content_of(file)

    before = content("0123456789abcdefghij")
    assert content("0123x56789abcdefghij") == before
    for other in (
        "x123456789abcdefghij",
        "01234567x9abcdefghij",
        "0123456789abcdefghix",
        "0123456789abcdefghijk",
    ):
        assert content(other) != before
    assert module._content_of(tmp_path / "nowhere") == "No such file or directory"
