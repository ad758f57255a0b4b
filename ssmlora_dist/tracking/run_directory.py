"""The directory a run leaves behind: configuration, metrics, summary, adapter, checkpoints and plots."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ssmlora_dist import durable
from ssmlora_dist.durable import explained
from ssmlora_dist.errors import CheckpointError

LOCK_FILE = ".lock"
# Of file systems that know no locks: there two runs on one directory cannot be told apart.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunDirectory:
    """Paths and records of one run; `claim`ed on rank 0.

    Attributes:
        path: the directory.
        adapter: where the trained adapter goes.
        checkpoints: where checkpoints go.
        plots: where plots go.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"
        self._lock: IO[str] | None = None
        self._unwritten = b""

    @classmethod
    def create(cls, path: Path, resume: bool = False) -> RunDirectory:
        """The directory at `path`, claimed; see `claim`."""
        directory = cls(path)
        directory.claim(resume)
        return directory

    def claim(self, resume: bool = False) -> None:
        """Makes the directory, or opens that of a run to continue; to be called by one rank only.

        The empty metrics.jsonl is the claim: of two runs that start with the same name at once, one gets
        the directory. This object holds the directory's lock from here on, until it is released or its
        process ends, however that ends.

        Raises:
            CheckpointError: the directory holds a run (without `resume`) or something that is not a run, is
                used by another process, or cannot be written.
        """
        continued = resume and self.metrics_file.exists()
        if not continued:
            self.check_free(self.path)
        with explained(self.path):
            self.path.mkdir(exist_ok=True)
            self._lock = _locked(self.path)
            if continued:
                _drop_unfinished_line(self.metrics_file)
                for directory in (self.path, self.adapter, self.plots):
                    for leftover in directory.glob(".*.partial"):
                        leftover.unlink()
                return
            try:
                self.metrics_file.open("x").close()
            except FileExistsError:
                raise CheckpointError(_taken(self.path)) from None

    def release(self) -> None:
        """Lets another process continue the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @staticmethod
    def check_free(path: Path, *, make_parents: bool = True) -> None:
        """Checks, before any long work, that `claim` would find the place free and writable.

        Args:
            path: of the run's directory.
            make_parents: whether what is to hold it is made, or only looked for.

        Raises:
            CheckpointError: as for `claim`.
        """
        with explained(path):
            if make_parents:
                path.parent.mkdir(parents=True, exist_ok=True)
            there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            if not there.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            if not os.access(there, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not path.exists():
                return
            if (path / "metrics.jsonl").exists():
                raise CheckpointError(_taken(path))
            # A run that was killed before its claim may have left the lock.
            if any(entry.name != LOCK_FILE for entry in path.iterdir()):
                raise CheckpointError(
                    f"{path}: exists, is not empty and holds no run (it has no metrics.jsonl); choose "
                    "another run.name, or remove the directory"
                )

    def write_config(self, config: Mapping[str, Any]) -> Path:
        """Writes the resolved configuration and returns the file.

        A run continued with another configuration keeps the first one and writes `config-2.json`, and so on.
        """
        text = _json_text(config)
        candidate, number = self.config_file, 1
        with explained(candidate):
            while candidate.exists() and candidate.read_text(encoding="utf-8") != text:
                number += 1
                candidate = self.path / f"config-{number}.json"
            if not candidate.exists():
                durable.write_text(candidate, text)
        return candidate

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl; numbers that are not finite become null.

        Raises:
            CheckpointError: the disk does not take it; it is kept, and written before the next line.
        """
        self._unwritten += json.dumps(_plain(row), allow_nan=False).encode() + b"\n"
        with explained(self.metrics_file), self.metrics_file.open("ab", buffering=0) as file:
            size, rest = file.tell(), self._unwritten
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise
        self._unwritten = b""

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, in the order they were written."""
        with self.metrics_file.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def cut_metrics(self, last_step: int) -> None:
        """Drops the rows of later steps from metrics.jsonl: a continued run writes them again."""
        rows = [row for row in self.read_metrics() if row["step"] <= last_step]
        with explained(self.metrics_file):
            durable.write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, whole or not at all; numbers that are not finite become null."""
        with explained(self.summary_file):
            durable.write_text(self.summary_file, _json_text(summary))


def _taken(path: Path) -> str:
    return (
        f"{path}: holds a run already, and nothing in it is overwritten; choose another run.name, continue "
        "the run with --resume, or remove the directory"
    )


def _locked(path: Path) -> IO[str] | None:
    """The lock file of a run directory, open and locked; None where the file system knows no locks."""
    file = (path / LOCK_FILE).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            file.seek(0)
            holder = file.read().strip()
        raise CheckpointError(
            f"{path}: another run is using it ({holder or 'it has just begun'}); wait until it has ended or "
            "stop it, or choose another run.name"
        ) from None
    except OSError as error:
        file.close()
        if error.errno not in _NO_LOCKS:
            raise
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _drop_unfinished_line(path: Path) -> None:
    """Cuts off the row that a killed run had not finished writing."""
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _json_text(content: Mapping[str, Any]) -> str:
    return json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: not finite -> null, one-element tensors and arrays -> numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    item = getattr(value, "item", None)
    return _plain(item()) if callable(item) else str(value)
