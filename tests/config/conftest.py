from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import ConfigError

Change = tuple[str, Any]
Load = Callable[..., RunConfig]
Problems = Callable[..., list[str]]

REMOVED = object()
"""As the value of a change: the key is taken out."""

WORKING: dict[str, Any] = {
    "run": {"name": "test"},
    "model": {
        "init": "random",
        "config": {"model_type": "llama"},
        "tokenizer": "bytes",
        "compute_dtype": "bfloat16",
    },
    "data": {
        "train": {"format": "task", "task": {"task": "passkey", "lengths": [512]}},
        "validation": {"format": "task", "task": {"task": "passkey", "lengths": [512, 1024]}},
    },
    "training": {"max_steps": 100, "global_batch_size": 8, "micro_batch_size": 2},
}


def changed(*changes: Change) -> dict[str, Any]:
    """A working configuration with the values at some dotted paths replaced."""
    data = copy.deepcopy(WORKING)
    for path, value in changes:
        *sections, key = path.split(".")
        holder = data
        for section in sections:
            holder = holder.setdefault(section, {})
        if value is REMOVED:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(value)
    return data


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a configuration (or raw text) to a file."""

    def write_config(content: Any) -> Path:
        path = tmp_path / "run.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write_config


@pytest.fixture
def load(write: Callable[[Any], Path]) -> Load:
    """Loads a working configuration with some changes, on one rank."""

    def load_changed(*changes: Change, overrides: Sequence[str] = (), **settings: Any) -> RunConfig:
        return load_config(write(changed(*changes)), overrides, **{"world_size": 1, **settings})

    return load_changed


@pytest.fixture
def problems(load: Load) -> Problems:
    """The problem lines of a changed configuration."""

    def problems_of(*changes: Change, **settings: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(*changes, **settings)
        return caught.value.problems

    return problems_of
