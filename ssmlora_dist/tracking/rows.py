"""Rows of a benchmark: one JSON object a line, each with what it was measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssmlora_dist.tracking.environment import environment_record


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds `row` to the file at once, with time, versions, git commit and hardware beside it.

    Args:
        path: a `.jsonl` file, made with its directory where it is not there.
        row: JSON types; keys carry their units.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        **row,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment_record(),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(whole) + "\n")
