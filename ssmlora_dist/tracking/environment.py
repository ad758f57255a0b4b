"""What a run stood on: versions, git commit, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "deepspeed", "bitsandbytes", "datasets", "mlflow")
GIT_TIMEOUT_SECONDS = 10
GIB = 2**30


def environment_record() -> dict[str, Any]:
    """The versions, the git commit of the working directory and the hardware that this process sees.

    Returns:
        `python` and `packages` (versions; None where not installed), `git` (None outside a repository, else
        `commit` and `dirty`) and `hardware`.
    """
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "git": git_record(Path.cwd()),
        "hardware": _hardware(),
    }


def git_record(directory: Path) -> dict[str, Any] | None:
    """Commit of the repository that holds a directory, and whether tracked files differ from it."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    """What git prints; None without git, without a repository or when it takes too long."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=GIT_TIMEOUT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    import torch

    # A job may be held to fewer cores than the machine has.
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "num_cpus": num_cpus,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "num_gpus": torch.cuda.device_count(),
        "gpu_name": None,
        "gpu_memory_gib": None,
        "cuda": torch.version.cuda,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        hardware["gpu_name"] = properties.name
        hardware["gpu_memory_gib"] = round(properties.total_memory / GIB, 1)
    return hardware
