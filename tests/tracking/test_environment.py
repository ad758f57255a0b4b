from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmlora_dist.tracking import environment
from ssmlora_dist.tracking.environment import environment_record, git_record


def test_versions_and_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    record = environment_record()
    assert record["python"] == platform.python_version()
    assert record["packages"] == {"torch": importlib.metadata.version("torch"), "no-such-package": None}
    assert record["hardware"]["num_cpus"] >= 1
    assert record["hardware"]["memory_gib"] > 0
    assert record["hardware"]["num_gpus"] == torch.cuda.device_count()
    assert json.loads(json.dumps(record)) == record


def test_commit_and_changes_of_a_repository(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert git_record(tmp_path) is None
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert git_record(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "untracked").write_text("runs and results are no change of the code")
    assert git_record(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_record(tmp_path) == {"commit": commit, "dirty": True}


def test_a_machine_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert git_record(tmp_path) is None
