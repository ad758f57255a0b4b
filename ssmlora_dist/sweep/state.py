"""What a sweep directory holds, and how it stays whole when the sweep is killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

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
        self.begun_file = path / "begun.json"
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
            DataError: a line is no row; with its number.
        """
        if not self.points_file.exists():
            return {}
        rows: dict[str, Row] = {}
        for number, line in enumerate(self.points_file.read_text(encoding="utf-8").splitlines(), 1):
            row = _row(line, f"{self.points_file}:{number}")
            if row.point in rows:
                raise DataError(
                    f"{self.points_file}:{number}: a second row of {row.point}; remove one of them"
                )
            rows[row.point] = row
        return rows

    def write_rows(self, rows: Iterable[Row]) -> None:
        """Replaces points.jsonl, all or nothing."""
        with explained(self.points_file, "free some and start the sweep again"):
            write_text(self.points_file, "".join(json.dumps(asdict(row)) + "\n" for row in rows))

    def write_json(self, path: Path, content: Any) -> None:
        """Replaces a file of the directory, all or nothing."""
        with explained(path, "free some and start the sweep again"):
            write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def begun(self) -> Begun:
        """What was begun before."""
        with contextlib.suppress(FileNotFoundError):
            return Begun(self, json.loads(self.begun_file.read_text(encoding="utf-8")))
        return Begun(self, {"parent": None, "points": {}})

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
            while (place := self.aside / f"{point}-{number}").exists():
                number += 1
            os.rename(run, place)
            sync(self.aside)
            if self.config(point).exists():
                # Beside what the run itself wrote, which a run that ended early did not.
                shutil.copyfile(self.config(point), place / "sweep_config.json")
        return place


class Begun:
    """What is known of points that have been started, written before they are: it outlives a kill.

    Attributes:
        parent: the sweep's own run at the tracker.
    """

    def __init__(self, directory: SweepDirectory, content: Mapping[str, Any]) -> None:
        self._directory = directory
        self.parent: str | None = content["parent"]
        self._points: dict[str, dict[str, Any]] = dict(content["points"])

    def training_digest(self, point: str) -> str | None:
        """With which the point's run directory was begun."""
        return self._points.get(point, {}).get("training_digest")

    def run_id(self, point: str) -> str | None:
        """The point's run at the tracker."""
        return self._points.get(point, {}).get("run_id")

    def note(self, point: str, training_digest: str, run_id: str | None) -> None:
        """Writes down that a point is about to be started."""
        self._points[point] = {"training_digest": training_digest, "run_id": run_id}
        self.write()

    def write(self) -> None:
        """Writes everything down."""
        content = {"parent": self.parent, "points": self._points}
        self._directory.write_json(self._directory.begun_file, content)


def _row(line: str, place: str) -> Row:
    remedy = "mend or remove the line: a point without a row is run, from where it stands"
    try:
        content = json.loads(line)
        row = Row(**{name: content[name] for name in (one.name for one in fields(Row))})
    except (ValueError, TypeError, KeyError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is no JSON object ({error})"
        raise DataError(f"{place}: {what}; {remedy}") from None
    if row.outcome not in get_args(Outcome):
        raise DataError(
            f"{place}: outcome {row.outcome!r}; allowed: {', '.join(get_args(Outcome))}; {remedy}"
        )
    return row
