"""Runs the points of a plan, side by side where there is room, each in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmlora_dist.errors import SSMLoRAError
from ssmlora_dist.progress import progress
from ssmlora_dist.sweep.directory import Outcome, Row, StartedRuns, SweepDirectory
from ssmlora_dist.sweep.measures import SUMMARY_FILE, measures, run_seconds
from ssmlora_dist.sweep.outcome import outcome_of, stopped_reason
from ssmlora_dist.sweep.plan import Plan, PlannedPoint, SweepState, estimate_seconds, sweep_state_of
from ssmlora_dist.sweep.process import (
    EXTRA_GRACE_SECONDS,
    PointProcess,
    command,
    end_leftovers,
    environment,
    free_port,
)
from ssmlora_dist.sweep.recording import Recorder
from ssmlora_dist.sweep.report import write_report
from ssmlora_dist.sweep.signals import StopSignals
from ssmlora_dist.sweep.table import LiveTable, RunningPoint, ended_line
from ssmlora_dist.tracking import RunStatus

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Resources:
    """What points run on.

    Attributes:
        devices: what CUDA_VISIBLE_DEVICES calls the devices there are; empty on a CPU.
        num_cpus: cores that the points share.
        scripts: directory of `train.py` and `evaluate.py`.
    """

    devices: Sequence[str]
    num_cpus: int
    scripts: Path

    def points_at_once(self, plan: Plan) -> int:
        """How many points run side by side at most."""
        least = min(planned.point.ranks for planned in plan.points)
        room = len(self.devices) // least if self.devices else None
        asked = plan.sweep.launcher.points_at_once
        return min(room, asked or room) if room is not None else asked or 1


@dataclass
class _Running:
    planned: PlannedPoint
    process: PointProcess
    stages: deque[str]
    devices: list[str]
    port: int
    began: float
    seconds_before: float
    run_id: str | None
    told: str | None = None
    timed_out: bool = False


class Execution:
    """One pass over a plan; see `run`.

    Args:
        plan: of the sweep.
        resources: what points run on.
        table: what a person sees.
        signals: that stop it.
    """

    def __init__(self, plan: Plan, resources: Resources, table: LiveTable, signals: StopSignals) -> None:
        self._plan, self._resources, self._table, self._signals = plan, resources, table, signals
        self._directory = plan.directory
        self._at_once = resources.points_at_once(plan)
        self._running: list[_Running] = []
        self._free = list(resources.devices)

    def run(self, started_runs: StartedRuns, recorder: Recorder, state: SweepState) -> dict[str, Row]:
        """Runs what is to be run until all of it has an outcome, or a signal stops it.

        Every outcome is on the disk as soon as there is one.

        Args:
            started_runs: what was started before.
            recorder: the tracker's side.
            state: points to run, and the rows there are.

        Returns:
            The rows of all points, in the plan's order.
        """
        self._started_runs, self._recorder = started_runs, recorder
        self._rows = dict(state.rows)
        self._waiting = deque(state.pending)
        try:
            while self._running or (self._waiting and self._signals.stopped_by is None):
                if self._signals.stopped_by is None:
                    self._start_what_fits()
                for running in list(self._running):
                    self._look_after(running)
                self._show()
                time.sleep(POLL_SECONDS)
        finally:
            for running in self._running:
                running.process.kill()
            self._table.close()
        return self._rows

    def _start_what_fits(self) -> None:
        while self._waiting and len(self._running) < self._at_once:
            ranks = self._waiting[0].point.ranks
            if self._resources.devices and ranks > len(self._free):
                return
            devices = [self._free.pop(0) for _ in range(ranks if self._resources.devices else 0)]
            self._begin(self._waiting.popleft(), devices)

    def _begin(self, planned: PlannedPoint, devices: list[str]) -> None:
        name, directory, row = planned.name, self._directory, self._rows[planned.name]
        run = directory.runs / name
        same = self._started_runs.training_digest(name) == planned.training_digest
        if not same:
            if (kept := directory.set_aside(name)) is not None:
                self._table.say(f"{name}: has changed; what it had before is in {kept}")
            if (open_run := self._started_runs.open_runs().get(name)) is not None:
                self._recorder.abandon(name, open_run)
        run_id = self._recorder.begin(planned, self._started_runs.run_id(name) if same else None)
        self._started_runs.note(name, planned.training_digest, run_id)
        tracking = planned.config.tracking.model_copy(update={"tags": self._recorder.tags(planned)})
        config = planned.config.model_copy(update={"tracking": tracking})
        directory.write_json(
            directory.config(name), config.model_dump(mode="json", by_alias=True, exclude={"schema_"})
        )
        stages = deque(["train"] if not (run / SUMMARY_FILE).exists() else [])
        stages += ["evaluate"] if self._plan.sweep.evaluate_tasks else []
        seconds_before = row.wall_seconds or 0.0
        if not stages:
            # Killed between the end of the run and that of the point.
            self._settle(planned, "finished", None, 0, seconds_before or None, run_id)
            self._free += devices
            return
        port = free_port([running.port for running in self._running])
        process = self._start(planned, stages.popleft(), devices, port, run_id)
        running = _Running(planned, process, stages, devices, port, time.monotonic(), seconds_before, run_id)
        self._running.append(running)
        self._table.say(f"{name}: started, log {directory.log(name)}")

    def _start(
        self, planned: PlannedPoint, stage: str, devices: Sequence[str], port: int, run_id: str | None
    ) -> PointProcess:
        directory, name = self._directory, planned.name
        arguments = ["--config", str(directory.config(name))]
        if stage == "train":
            arguments += ["--resume", "auto"]
        else:
            arguments += ["--adapter", str(directory.runs / name / "adapter"), "--no-base"]
            # Its results are recorded with the training's.
            arguments += ["--set", "tracking.tracker=none"]
        variables: dict[str, str | None] = {"MLFLOW_RUN_ID": run_id}
        if self._resources.devices:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        elif "OMP_NUM_THREADS" not in os.environ:
            share = self._resources.num_cpus // (self._at_once * planned.point.ranks)
            variables["OMP_NUM_THREADS"] = str(max(1, share))
        ranks = planned.point.ranks
        script = self._resources.scripts / f"{stage}.py"
        return PointProcess(
            command(script, arguments, ranks=ranks, port=port, on_cuda=bool(self._resources.devices)),
            environment(directory.path, variables),
            directory.log(name),
            planned.config.checkpoint.grace_seconds + EXTRA_GRACE_SECONDS,
        )

    def _look_after(self, running: _Running) -> None:
        limit, now = self._plan.sweep.timeout_seconds, time.monotonic()
        stopped_by = self._signals.stopped_by
        if stopped_by is not None and running.told is None:
            running.told = f"stopped by {signal.Signals(stopped_by).name}"
            running.process.stop()
        elif limit is not None and now - running.began > limit and running.told is None:
            running.told, running.timed_out = f"took longer than timeout_seconds ({limit:g})", True
            running.process.stop()
        if self._signals.is_urgent:
            running.process.kill()
        code = running.process.poll()
        if code is None:
            return
        if code == 0 and running.stages and running.told is None:
            stage = running.stages.popleft()
            running.process = self._start(
                running.planned, stage, running.devices, running.port, running.run_id
            )
            return
        self._running.remove(running)
        self._free += running.devices
        seconds = running.seconds_before + now - running.began
        self._settle(running.planned, *self._outcome(running, code), code, seconds, running.run_id)

    def _outcome(self, running: _Running, code: int) -> tuple[Outcome, str | None]:
        log = running.process.written()
        if code == 0 and not running.stages:
            return "finished", None
        if running.told is None:
            return outcome_of(code, log, running.process.kernel_killed)
        where = stopped_reason(log)
        reason = f"{running.told}: {where}" if where else running.told
        return ("failed" if running.timed_out else "stopped"), reason

    def _settle(
        self,
        planned: PlannedPoint,
        outcome: Outcome,
        reason: str | None,
        code: int,
        seconds: float | None,
        run_id: str | None,
    ) -> None:
        """Writes down what became of a point."""
        run, with_tasks = self._directory.runs / planned.name, self._plan.sweep.evaluate_tasks
        metrics: dict[str, float] = {}
        if outcome == "finished":
            try:
                metrics = measures(run, with_tasks=with_tasks)
                # Where the sweep was killed in the meantime, the run itself knows more.
                seconds = max(seconds or 0.0, run_seconds(run))
            except SSMLoRAError as error:
                outcome, reason = "failed", str(error)
        row = planned.row(
            outcome=outcome,
            reason=reason,
            exit_code=code,
            wall_seconds=seconds,
            metrics=metrics,
            mlflow_run_id=run_id,
        )
        self._rows[planned.name] = row
        self._directory.write_rows(self._rows.values())
        self._recorder.end(row)
        self._table.say(ended_line(row, len(self._waiting) + len(self._running)))

    def _show(self) -> None:
        if not self._table.is_due():
            return
        now = time.monotonic()
        shown = [
            RunningPoint(one.planned.name, self._doing(one), one.seconds_before + now - one.began)
            for one in self._running
        ]
        left = [*(one.planned for one in self._running), *self._waiting]
        seconds = estimate_seconds(left, self._rows)
        if seconds is not None:
            elapsed = sum(now - one.began for one in self._running)
            seconds = max(0.0, seconds - elapsed) / max(1, min(self._at_once, len(left)))
        self._table.draw(self._rows, shown, [planned.name for planned in self._waiting], seconds)

    def _doing(self, running: _Running) -> str:
        """How far the point is."""
        run = self._directory.runs / running.planned.name
        if (run / SUMMARY_FILE).exists():
            return "answers tasks" if self._plan.sweep.evaluate_tasks else "ends"
        row = _last_row(run / "metrics.jsonl")
        if row is None:
            return "starts"
        num_steps = running.planned.config.training.max_steps
        loss = f", loss {row['loss']:.4f}" if isinstance(row.get("loss"), float) else ""
        return f"step {row.get('step')}{f' of {num_steps}' if num_steps else ''}{loss}"


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file that is being written."""
    with suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
        row = json.loads(lines[-1]) if lines else None
        return row if isinstance(row, dict) else None
    return None


@dataclass(frozen=True)
class Result:
    """What a sweep has come to; `stopped_by` is the signal that stopped it."""

    rows: dict[str, Row]
    stopped_by: int | None

    @property
    def num_finished(self) -> int:
        return sum(row.outcome == "finished" for row in self.rows.values())


def run_sweep(plan: Plan, resources: Resources, *, retry_failed: bool = False) -> Result:
    """Runs what a plan has left, in its directory.

    Started again after whatever end it does what is missing: points that have an outcome stay as they are,
    those that were running go on from their checkpoints.

    Args:
        plan: of the sweep.
        resources: what points run on.
        retry_failed: whether points that failed or ran out of memory are run again.

    Raises:
        SSMLoRAError: another sweep is using the directory, or what it holds cannot be used.
    """
    directory, table = plan.directory, LiveTable(plan.sweep.name, sys.stderr)
    with directory.claimed(), StopSignals() as signals:
        state = sweep_state_of(plan, directory.read_rows(), retry_failed=retry_failed)
        started_runs = directory.started_runs()
        grace = max(planned.config.checkpoint.grace_seconds for planned in plan.points) + EXTRA_GRACE_SECONDS
        with progress("ending what a killed sweep has left running"):
            number = end_leftovers(directory.path, grace)
        if number:
            table.say(f"{number} processes of a sweep that was killed were ended")
        directory.keep_rows(state.replaced)
        directory.write_rows(state.rows.values())
        directory.write_json(directory.sweep_file, plan.sweep.model_dump(mode="json", by_alias=True))
        recorder = Recorder(plan, started_runs, lambda text: table.say(f"warning: {text}"))
        status: RunStatus = "FAILED"
        result = Result(dict(state.rows), None)
        try:
            with progress("beginning the record of the sweep"):
                recorder.start()
            rows = Execution(plan, resources, table, signals).run(started_runs, recorder, state)
            result = Result(rows, signals.stopped_by)
            status = "KILLED" if result.stopped_by else "FINISHED" if result.num_finished else "FAILED"
            if not result.stopped_by:
                _report(directory, table)
        finally:
            files = [directory.sweep_file, directory.points_file]
            report = directory.report if directory.report.is_dir() else None
            try:
                recorder.end_open_runs(result.rows)
            finally:
                with progress("completing the record of the sweep"):
                    recorder.finish(status, result.rows, files, report)
    return result


def _report(directory: SweepDirectory, table: LiveTable) -> None:
    """The report; whatever is in its way, it can be written later."""
    try:
        page = write_report(directory.path, directory.report)[0]
    except SSMLoRAError as error:
        table.say(f"warning: no report: {error}")
    else:
        table.say(f"report: {page}")
