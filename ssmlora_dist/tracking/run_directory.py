"""The directory a run leaves behind: configuration, metrics, summary, adapter, checkpoints and plots."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ssmlora_dist import durable
from ssmlora_dist.errors import CheckpointError

_REMEDIES = {
    errno.EACCES: "no permission to write; change its permissions or choose another run.output_dir",
    errno.EPERM: "no permission to write; change its permissions or choose another run.output_dir",
    errno.EROFS: "the file system is read-only; choose another run.output_dir",
    errno.ENOSPC: "no space left on the device; free some or choose another run.output_dir",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another run.output_dir",
    errno.ENOTDIR: "a part of this path is a file, not a directory; choose another run.output_dir",
    errno.EEXIST: "a part of this path is a file, not a directory; choose another run.output_dir",
}


class RunDirectory:
    """Paths and records of one run; made by `create` on rank 0, by the constructor on the others.

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

    @classmethod
    def create(cls, path: Path, resume: bool = False) -> RunDirectory:
        """Makes the directory, or opens that of a run to continue; to be called by one rank only.

        The empty metrics.jsonl is the claim: of two runs that start with the same name at once, one gets
        the directory.

        Raises:
            CheckpointError: the directory holds a run (without `resume`) or something that is not a run, or
                cannot be written.
        """
        directory = cls(path)
        if resume and directory.metrics_file.exists():
            with _explained(path):
                _drop_unfinished_line(directory.metrics_file)
            return directory
        cls.check_free(path)
        with _explained(path):
            path.mkdir(exist_ok=True)
            try:
                directory.metrics_file.open("x").close()
            except FileExistsError:
                raise CheckpointError(_taken(path)) from None
        return directory

    @staticmethod
    def check_free(path: Path) -> None:
        """Checks, before any long work, that `create` would find the place free and writable.

        Raises:
            CheckpointError: as for `create`.
        """
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not path.exists():
                return
            if (path / "metrics.jsonl").exists():
                raise CheckpointError(_taken(path))
            if any(path.iterdir()):
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
        with _explained(candidate):
            while candidate.exists() and candidate.read_text(encoding="utf-8") != text:
                number += 1
                candidate = self.path / f"config-{number}.json"
            if not candidate.exists():
                durable.write_text(candidate, text)
        return candidate

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl; numbers that are not finite become null."""
        line = json.dumps(_plain(row), allow_nan=False) + "\n"
        with _explained(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl, in the order they were written."""
        with self.metrics_file.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json, whole or not at all; numbers that are not finite become null."""
        with _explained(self.summary_file):
            durable.write_text(self.summary_file, _json_text(summary))


def _taken(path: Path) -> str:
    return (
        f"{path}: holds a run already, and nothing in it is overwritten; choose another run.name, continue "
        "the run with --resume, or remove the directory"
    )


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into an error with a remedy."""
    try:
        yield
    except OSError as error:
        fallback = f"{error.strerror or error}; choose another run.output_dir"
        remedy = _REMEDIES.get(error.errno or 0, fallback)
        raise CheckpointError(f"{path}: cannot be written: {remedy}") from error


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
