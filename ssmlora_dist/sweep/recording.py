"""A sweep at the tracker: a parent run, and below it one run for each point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ssmlora_dist.config.build import build_store
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.sweep.directory import Outcome, Row, StartedRuns
from ssmlora_dist.sweep.plan import Plan, PlannedPoint
from ssmlora_dist.tracking import (
    NullTracker,
    RunStatus,
    Tracker,
    check_store,
    environment_record,
    flat_parameters,
    mlflow_tracker,
)
from ssmlora_dist.training.report import environment_tags

PARENT_TAG = "mlflow.parentRunId"
_STATUS: dict[Outcome, RunStatus] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "out_of_memory": "FAILED",
    "stopped": "KILLED",
    "not_run": "KILLED",
}


def check_stores(plan: Plan, warn: Callable[[str], object]) -> list[str]:
    """The stores and experiments that points are to be recorded in, after a look at each.

    Raises:
        ConfigError: nothing can be recorded there.
    """
    stores = {str(store): store for one in plan.points if (store := build_store(one.config)) is not None}
    for store in stores.values():
        check_store(store, warn)
    return list(stores)


class Recorder:
    """Begins the runs of points before the points are started, and ends them with what became of them.

    So a point that fails before it tracks anything, or is killed, has a run with a true status too. The
    training goes on with the run that is begun here (by MLFLOW_RUN_ID).

    Args:
        plan: of the sweep.
        started_runs: ids of runs that were started before, which are gone on with.
        warn: shows one line to the user.
    """

    def __init__(self, plan: Plan, started_runs: StartedRuns, warn: Callable[[str], object]) -> None:
        self._plan, self._started_runs, self._warn = plan, started_runs, warn
        self._parent: Tracker = NullTracker()
        self._points: dict[str, Tracker] = {}

    def start(self) -> None:
        """Begins the parent run, or goes on with it."""
        sweep = self._plan.sweep
        self._parent = self._tracker(sweep.name, self._plan.points[0].config, self._started_runs.parent)
        parameters = flat_parameters(sweep.model_dump(mode="json", by_alias=True))
        tags = environment_tags(environment_record()) | {"sweep": sweep.name}
        self._parent.start(sweep.name, parameters, tags)
        self._note_parent()

    def tags(self, planned: PlannedPoint) -> dict[str, str]:
        """Of a point's run."""
        point = planned.point
        tags = {"sweep": self._plan.sweep.name, "sweep.group": point.group, "sweep.seed": str(point.seed)}
        return {**planned.config.tracking.tags, **tags, **self._parent_tag()}

    def begin(self, planned: PlannedPoint, run_id: str | None) -> str | None:
        """Begins the run of a point, or goes on with `run_id`; gives its id, None where there is none yet."""
        self._note_parent()
        tracker = self._started(planned, run_id)
        if tracker.run_id is None and (run_id is None or isinstance(tracker, NullTracker)):
            # The training will begin one of its own: there must not be two.
            tracker.finish("KILLED")
            # The last attempt may have begun it after all.
            run_id = tracker.run_id
            tracker = NullTracker() if run_id is None else self._started(planned, run_id)
        self._points[planned.name] = tracker
        return tracker.run_id or run_id

    def end(self, row: Row) -> None:
        """Ends a point's run: its row as metrics and tags, results on tasks as artifacts, its true status."""
        tracker = self._points.pop(row.point)
        # The parent may have been begun after it, where the tracker was away.
        told = {"sweep.outcome": row.outcome, "sweep.reason": row.reason or "", **self._parent_tag()}
        tracker.set_tags(told)
        tracker.log_metrics({f"result/{name}": value for name, value in row.metrics.items()}, step=0)
        evaluation = self._plan.directory.runs / row.point / "evaluation"
        if row.outcome == "finished" and evaluation.is_dir():
            tracker.log_directory(evaluation, "evaluation")
        if tracker.finish(_STATUS[row.outcome]):
            self._started_runs.note_end(row.point)

    def end_open_runs(self, rows: Mapping[str, Row]) -> None:
        """Ends runs that are open still, with what became of them.

        A sweep that was killed has left them, or the tracker was away when they should have been ended.
        """
        for name, run_id in self._started_runs.open_runs().items():
            row = rows.get(name)
            ended = row is not None and row.mlflow_run_id == run_id
            self.abandon(name, run_id, row if ended else None)

    def abandon(self, name: str, run_id: str, row: Row | None = None) -> None:
        """Ends a run that is not gone on with: as its row says, or as killed."""
        if name not in self._points:
            tracker = self._tracker(name, self._plan.points[0].config, run_id)
            tracker.start(name, {}, self._parent_tag())
            self._points[name] = tracker
        killed = Row(name, "", {}, "", 0, "stopped", "the sweep ended before it did")
        self.end(row or killed)

    def finish(
        self, status: RunStatus, rows: Mapping[str, Row], files: Iterable[Path], report: Path | None = None
    ) -> None:
        """Ends the parent run, with how many points came to what, and the files of the sweep."""
        for outcome in _STATUS:
            number = sum(row.outcome == outcome for row in rows.values())
            self._parent.log_metrics({f"num_{outcome}": number}, step=0)
        for file in files:
            self._parent.log_artifact(file)
        if report is not None:
            self._parent.log_directory(report, "report")
        self._parent.finish(status)

    def _started(self, planned: PlannedPoint, run_id: str | None) -> Tracker:
        tracker = self._tracker(planned.name, planned.config, run_id)
        parameters = flat_parameters(planned.config.model_dump(mode="json", by_alias=True))
        tracker.start(planned.name, parameters, self.tags(planned))
        return tracker

    def _parent_tag(self) -> dict[str, str]:
        parent = self._parent.run_id or self._started_runs.parent
        return {PARENT_TAG: parent} if parent else {}

    def _note_parent(self) -> None:
        """Writes the parent's id down, as soon as it has one."""
        if self._parent.run_id not in (None, self._started_runs.parent):
            self._started_runs.parent = self._parent.run_id
            self._started_runs.write()

    def _tracker(self, name: str, config: RunConfig, run_id: str | None) -> Tracker:
        store = build_store(config)
        if store is None:
            return NullTracker()

        def warn(text: str) -> None:
            self._warn(f"{name}: {text}")

        return mlflow_tracker(store, warn, run_id)
