"""The rows of the study: JSON lines, of which those of one run are added together or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmlora_dist.errors import DataError


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is none. A last line that a kill has left half-written is dropped.

    Raises:
        DataError: another line is no row.
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            print(f"{path}:{number}: half-written, by a run that was killed; dropped", file=sys.stderr)
            break
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "task" not in row:
                raise ValueError("no object with a task")
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: is no row of the study ({error}); remove the line, or name another --rows"
            ) from error
        rows.append(row)
    return rows


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds the rows of one run in one write, in place of a half-written last line if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        kept = file.read().rfind(b"\n") + 1
        if kept < end:
            file.truncate(kept)
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
