"""A sweep at the tracker: a parent run, and below it one run for each point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.sweep.plan import Plan, PlannedPoint
from ssmlora_dist.sweep.state import Begun, Outcome, Row
from ssmlora_dist.tracking import (
    NullTracker,
    RunStatus,
    Tracker,
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


class Recorder:
    """Begins the runs of points before the points are started, and ends them with what became of them.

    So a point that fails before it tracks anything, or is killed, has a run with a true status too. The
    training goes on with the run that is begun here (by MLFLOW_RUN_ID).

    Args:
        plan: of the sweep.
        begun: ids of runs that were begun before, which are gone on with.
        warn: shows one line to the user.
    """

    def __init__(self, plan: Plan, begun: Begun, warn: Callable[[str], object]) -> None:
        self._plan, self._begun, self._warn = plan, begun, warn
        self._parent: Tracker = NullTracker()
        self._points: dict[str, Tracker] = {}

    def start(self) -> None:
        """Begins the parent run, or goes on with it."""
        sweep = self._plan.sweep
        self._parent = self._tracker(self._plan.points[0].config, self._begun.parent)
        parameters = flat_parameters(sweep.model_dump(mode="json", by_alias=True))
        tags = environment_tags(environment_record()) | {"sweep": sweep.name}
        if self._parent.start(sweep.name, parameters, tags) is not None:
            self._begun.parent = self._parent.run_id
            self._begun.write()

    def tags(self, planned: PlannedPoint) -> dict[str, str]:
        """Of a point's run."""
        point, parent = planned.point, self._parent.run_id
        tags = {"sweep": self._plan.sweep.name, "sweep.group": point.group, "sweep.seed": str(point.seed)}
        return {**planned.config.tracking.tags, **tags, **({PARENT_TAG: parent} if parent else {})}

    def begin(self, planned: PlannedPoint, run_id: str | None) -> str | None:
        """Begins the run of a point, or goes on with `run_id`; gives its id, None where there is none yet."""
        config = planned.config
        tracker = self._tracker(config, run_id)
        tracker.start(
            planned.name, flat_parameters(config.model_dump(mode="json", by_alias=True)), self.tags(planned)
        )
        if tracker.run_id is None:
            # The training will begin one of its own: there must not be two.
            tracker.finish("KILLED")
            tracker = NullTracker()
        self._points[planned.name] = tracker
        return tracker.run_id

    def end(self, row: Row, evaluation: Path | None) -> None:
        """Ends a point's run: its row as metrics and tags, results on tasks as artifacts, its true status."""
        tracker = self._points.pop(row.point)
        tracker.set_tags({"sweep.outcome": row.outcome, "sweep.reason": row.reason or ""})
        tracker.log_metrics({f"result/{name}": value for name, value in row.metrics.items()}, step=0)
        if evaluation is not None:
            tracker.log_directory(evaluation, "evaluation")
        tracker.finish(_STATUS[row.outcome])

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

    def _tracker(self, config: RunConfig, run_id: str | None) -> Tracker:
        tracking = config.tracking
        if tracking.tracker == "none":
            return NullTracker()
        sweep = self._plan.sweep
        return mlflow_tracker(sweep.output_dir, tracking.uri, tracking.experiment, self._warn, run_id)
