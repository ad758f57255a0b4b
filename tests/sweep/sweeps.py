"""Sweep files for tests, over a base configuration of which nothing is computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ssmlora_dist.sweep.execute import Resources
from ssmlora_dist.sweep.plan import Plan, plan_sweep

FAKES = Path(__file__).with_name("fakes")
BASE: dict[str, Any] = {
    "run": {"name": "base"},
    "model": {
        "init": "random",
        "config": {"model_type": "llama", "hidden_size": 16},
        "tokenizer": "bytes",
        "compute_dtype": "float32",
    },
    "data": {
        "train": {"format": "task", "task": {"task": "passkey", "lengths": [256]}},
        "max_length": 256,
    },
    "training": {"max_steps": 4, "global_batch_size": 4},
    "checkpoint": {"grace_seconds": 5},
    "tracking": {"tracker": "none"},
}
GRID = {"method": {"ssmlora": {}, "lora": {"adapter.method": "lora"}}, "adapter.rank": [2, 4]}


def write_sweep(directory: Path, **changes: Any) -> Path:
    """A base configuration and a sweep over it; gives the sweep file."""
    base = directory / "base.json"
    base.write_text(json.dumps(BASE))
    sweep = {"name": "sweep", "base": str(base), "output_dir": str(directory / "sweeps"), "grid": GRID}
    file = directory / "sweep.json"
    file.write_text(json.dumps(sweep | changes))
    return file


def plan_of(directory: Path, **changes: Any) -> Plan:
    """The plan of a sweep on a CPU."""
    return plan_sweep(str(write_sweep(directory, **changes)))


def resources(devices: tuple[str, ...] = (), num_cpus: int = 1) -> Resources:
    """Where the fakes run."""
    return Resources(devices, num_cpus, FAKES)
