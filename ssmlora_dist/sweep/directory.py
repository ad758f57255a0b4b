"""What a sweep directory holds, and how it stays whole when the sweep is killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from ssmlora_dist.config.problems import dotted
from ssmlora_dist.config.shown import shown
from ssmlora_dist.durable import explained, sync, write_text
from ssmlora_dist.errors import CheckpointError, DataError

Outcome = Literal["finished", "failed", "out_of_memory", "stopped", "not_run"]
FINAL: tuple[Outcome, ...] = ("finished", "failed", "out_of_memory")
"""Outcomes of points that are not run again."""

LOCK_FILE = ".lock"
# Of file systems that know no locks: there two sweeps on one directory cannot be told apart.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@dataclass(frozen=True)
class Row:
    """One line of points.jsonl.

    Attributes:
        point: name.
        digest: of what decided the results; see `PlannedPoint.digest`.
        overrides: the point's own values by dotted key.
        group: see `Point`.
        seed: of the run.
        outcome: what became of it.
        reason: one line; None of a finished point.
        exit_code: of the process that decided the outcome; negative for a signal; None where none ran.
        wall_seconds: that its processes ran, over all the times it was started and ended under a sweep.
        metrics: by name.
        mlflow_run_id: None where it was not recorded.
    """

    point: str
    digest: str
    overrides: Mapping[str, Any]
    group: str
    seed: int
    outcome: Outcome = "not_run"
    reason: str | None = None
    exit_code: int | None = None
    wall_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    mlflow_run_id: str | None = None


class SweepDirectory:
    """Paths and records of one sweep.

    Attributes:
        path: the directory.
        runs: run directories, by point.
        configs: run configurations, by point.
        logs: what the processes wrote, by point.
        aside: what changed points had before.
        report: the plots and the page.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sweep_file = path / "sweep.json"
        self.points_file = path / "points.jsonl"
        self.started_file = path / "begun.json"
        self.runs = path / "runs"
        self.configs = path / "configs"
        self.logs = path / "logs"
        self.aside = path / "aside"
        self.report = path / "report"

    def log(self, point: str) -> Path:
        """Where the output of a point's processes goes."""
        return self.logs / f"{point}.log"

    def config(self, point: str) -> Path:
        """The run configuration of a point."""
        return self.configs / f"{point}.json"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes the directory and keeps other sweeps out of it until the end, however that comes.

        Raises:
            CheckpointError: another sweep is using it, or it cannot be written.
        """
        with explained(self.path, "choose another output_dir"):
            for directory in (self.path, self.runs, self.configs, self.logs):
                directory.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK_FILE).open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.path}: another sweep is using it; wait until it has ended, or stop it"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            for directory in (self.path, self.configs):
                for leftover in directory.glob(".*.partial"):
                    leftover.unlink()
            yield

    def read_rows(self) -> dict[str, Row]:
        """The rows of points.jsonl by point; none where there is no such file.

        Raises:
            DataError: lines are no rows; with all their numbers.
        """
        if not self.points_file.exists():
            return {}
        with _reading(self.points_file):
            lines = self.points_file.read_bytes().split(b"\n")
        rows: dict[str, Row] = {}
        broken = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _ROW.validate_json(line, strict=True)
            except ValidationError as error:
                broken.append(f"line {number}: {_what_is_wrong(error)}")
                continue
            if row.point in rows:
                broken.append(f"line {number}: a second row of {row.point}")
            rows[row.point] = row
        if broken:
            plural = "s" if len(broken) > 1 else ""
            heading = (
                f"{self.points_file}: {len(broken)} broken row{plural}; mend or remove them: a point "
                "without a row is run, from where it stands"
            )
            raise DataError("\n  ".join([heading, *broken]))
        return rows

    def write_rows(self, rows: Iterable[Row]) -> None:
        """Replaces points.jsonl, all or nothing."""
        with explained(self.points_file, "free some and start the sweep again"):
            write_text(self.points_file, "".join(json.dumps(asdict(row)) + "\n" for row in rows))

    def write_json(self, path: Path, content: Any) -> None:
        """Replaces a file of the directory, all or nothing."""
        with explained(path, "free some and start the sweep again"):
            write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def started_runs(self) -> StartedRuns:
        """What was started before.

        Raises:
            DataError: that is not known, as its file is broken.
        """
        if not self.started_file.exists():
            return StartedRuns(self, _StartedRunsContent(None, {}))
        with _reading(self.started_file):
            content = self.started_file.read_bytes()
        try:
            return StartedRuns(self, _STARTED_RUNS.validate_json(content, strict=True))
        except ValidationError as error:
            raise DataError(
                f"{self.started_file}: {_what_is_wrong(error)}; remove it: points without an outcome then "
                "begin anew, and what they have is kept in `aside`"
            ) from None

    def keep_rows(self, rows: Iterable[Row]) -> None:
        """Adds rows that leave points.jsonl to those kept aside."""
        text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
        if text:
            with explained(self.aside, "free some and start the sweep again"):
                self.aside.mkdir(exist_ok=True)
                with (self.aside / "points.jsonl").open("a", encoding="utf-8") as file:
                    file.write(text)

    def set_aside(self, point: str) -> Path | None:
        """Moves a point's run directory to `aside/POINT-1` and so on; None where there is none."""
        run = self.runs / point
        if not run.exists():
            return None
        with explained(self.aside, "free some and start the sweep again"):
            self.aside.mkdir(exist_ok=True)
            number = 1
            while (target := self.aside / f"{point}-{number}").exists():
                number += 1
            os.rename(run, target)
            sync(self.aside)
            if self.config(point).exists():
                # Beside what the run itself wrote, which a run that ended early did not.
                shutil.copyfile(self.config(point), target / "sweep_config.json")
        return target


@dataclass(frozen=True)
class _StartedRun:
    training_digest: str
    run_id: str | None
    is_ended: bool = False


@dataclass(frozen=True)
class _StartedRunsContent:
    parent: str | None
    points: Mapping[str, _StartedRun]


class StartedRuns:
    """What is known of points that have been started, written before they are: it outlives a kill.

    Attributes:
        parent: the sweep's own run at the tracker.
    """

    def __init__(self, directory: SweepDirectory, content: _StartedRunsContent) -> None:
        self._directory = directory
        self.parent = content.parent
        self._points = dict(content.points)

    def training_digest(self, point: str) -> str | None:
        """With which the point's run directory was started."""
        return self._points[point].training_digest if point in self._points else None

    def run_id(self, point: str) -> str | None:
        """The point's run at the tracker."""
        return self._points[point].run_id if point in self._points else None

    def open_runs(self) -> dict[str, str]:
        """Runs at the tracker that were started and not ended, by point."""
        return {
            name: entry.run_id
            for name, entry in self._points.items()
            if entry.run_id is not None and not entry.is_ended
        }

    def note(self, point: str, training_digest: str, run_id: str | None) -> None:
        """Writes down that a point is about to be started."""
        self._points[point] = _StartedRun(training_digest, run_id)
        self.write()

    def note_end(self, point: str) -> None:
        """Writes down that the point's run at the tracker has its status."""
        if self._points[point].run_id is not None:
            self._points[point] = replace(self._points[point], is_ended=True)
            self.write()

    def write(self) -> None:
        """Writes everything down."""
        content = _StartedRunsContent(self.parent, self._points)
        self._directory.write_json(self._directory.started_file, asdict(content))


_ROW = TypeAdapter(Row)
_STARTED_RUNS = TypeAdapter(_StartedRunsContent)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the file system refuses while `path` is read into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable") from None


def _what_is_wrong(error: ValidationError) -> str:
    """The first problem, and how many there are."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where, message = dotted(first["loc"]), first["msg"]
    if first["type"] != "missing" and first["type"] != "json_invalid":
        message = f"{shown(first['input'])} given; {message[0].lower()}{message[1:]}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"
