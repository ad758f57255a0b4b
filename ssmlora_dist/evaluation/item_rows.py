"""Rows of finished items, as JSON lines that survive a kill: what a started-again evaluation need not repeat.

Every rank appends to a file of its own. A kill can leave half a line at the end of a file; it is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ssmlora_dist.durable import explained, write_text
from ssmlora_dist.errors import CheckpointError

Row = dict[str, Any]
Key = tuple[str, str]
"""Task and item."""

PARTS_DIRECTORY = "parts"
RESULTS_FILE = "results.jsonl"
_OTHERWISE = "choose another output directory"


def key_of(row: Mapping[str, Any]) -> Key:
    """Which item a row is about."""
    return row["task"], row["id"]


def read_parts(directory: Path) -> list[Row]:
    """All rows that any rank of an earlier start has finished, each with its `digest`.

    Raises:
        CheckpointError: a file that cannot be read, or was not written by an evaluation.
    """
    rows: list[Row] = []
    for path in sorted((directory / PARTS_DIRECTORY).glob("rank-*.jsonl")):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; {_OTHERWISE}") from error
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                key_of(row), row["digest"]
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(
                    f"{path}:{number}: is no row of an evaluation; remove the file, and its items are "
                    "evaluated again"
                ) from None
            rows.append(row)
    return rows


class PartFile:
    """A rank's own file, open for more rows.

    Args:
        directory: of the evaluation; made where it is not there.
        rank: of this process.

    Raises:
        CheckpointError: it cannot be written.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / PARTS_DIRECTORY / f"rank-{rank}.jsonl"
        with explained(self._path, _OTHERWISE):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self._path.open("ab")
            content = self._path.read_bytes()
            self._file.truncate(content.rfind(b"\n") + 1)

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows, and waits until they are on the disk.

        Raises:
            CheckpointError: they cannot be written.
        """
        with explained(self._path, _OTHERWISE):
            self._file.write("".join(_line(row) for row in rows).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def write_results(directory: Path, rows: Sequence[Row]) -> None:
    """Replaces the result file by `rows`, all or nothing.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = directory / RESULTS_FILE
    with explained(path, _OTHERWISE):
        directory.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(map(_line, rows)))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
