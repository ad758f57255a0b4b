"""Runs recorded in MLflow: a local sqlite file by default, or any server by its URI.

Everything that talks to MLflow happens on one background thread (`Delivery`), so that a slow or dead server
never slows training; the client is used without MLflow's global state.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmlora_dist.tracking.delivery import Delivery
from ssmlora_dist.tracking.limits import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAMETERS_PER_BATCH,
    batches,
    in_short,
    parameter_text,
    valid_name,
)
from ssmlora_dist.tracking.mlflow_store import (
    START_TIMEOUT_SECONDS,
    find_experiment,
    import_mlflow,
    is_installed,
    is_passing,
    open_store,
)
from ssmlora_dist.tracking.processes import HOST_TAG, Process
from ssmlora_dist.tracking.protocol import NullTracker, RunStatus, Scalar, Tracker
from ssmlora_dist.tracking.store import Store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FLUSH_SECONDS = 5.0
FINISH_TIMEOUT_SECONDS = 120.0
FINISH_TIMEOUT_AWAY_SECONDS = 10.0
# A file that the artifact store goes on refusing must not hold up the metrics behind it.
MAX_ARTIFACT_ATTEMPTS = 3

# Of one look; the next run finds what is left.
MAX_LOST_RUNS = 1000

_Metric = tuple[str, float, int, int]


def mlflow_tracker(store: Store, warn: Callable[[str], object], run_id: str | None = None) -> Tracker:
    """A tracker for one run on this process; a `NullTracker`, with a warning, where MLflow is not installed.

    Args:
        store: where the run is recorded, and in which experiment, which is made when it does not exist.
        warn: shows one line to the user; may be called from another thread.
        run_id: the run to continue; a new run is begun where the store has no such run.
    """
    if not is_installed():
        warn(
            "MLflow is not installed: metrics go to metrics.jsonl only; "
            'install it with `pip install mlflow`, or set tracking.tracker to "none"'
        )
        return NullTracker()
    return MLflowTracker(store, warn, run_id)


class MLflowTracker:
    """Records one run with MLflow; see `Tracker` for what the methods do.

    Metrics are sent in batches, every few seconds. What could not be sent is tried again as long as the run
    lasts; the user is warned once, and told at the end what is missing.

    Runs of processes on this machine that are gone without having ended their run are ended, as killed.

    Args:
        store: where the run is recorded.
        warn: shows one line to the user; also called from the background thread.
        run_id: the run to continue.
    """

    def __init__(self, store: Store, warn: Callable[[str], object], run_id: str | None = None) -> None:
        self._store = store
        self._warn = warn
        self._resumed_id = run_id
        self._run_id: str | None = None
        self._client: MlflowClient | None = None
        self._delivery: Delivery | None = None
        self._last_error = ""
        self._pending: list[_Metric] = []
        self._last_flush = time.monotonic()
        self._finishing = threading.Lock()
        self._has_all = True

    @property
    def run_id(self) -> str | None:
        """The run's id, as soon as the store has given one."""
        return self._run_id

    def start(self, run_name: str, parameters: Mapping[str, Scalar], tags: Mapping[str, str]) -> str | None:
        """Begins or continues the run; waits a bounded time for the store's first answer."""
        try:
            # On the calling thread: importing on two threads at once can deadlock.
            import_mlflow()
        except Exception as error:
            self._warn(f"MLflow cannot be imported ({in_short(error)}): metrics go to metrics.jsonl only")
            return None
        self._process = Process.own()
        own = self._process.tags() if self._process else {}
        self._delivery = Delivery(
            lambda: self._connect(run_name, {**tags, **own}), is_passing, self._note_failure
        )
        self._delivery.submit(self._end_lost_runs, max_attempts=MAX_ARTIFACT_ATTEMPTS)
        printable = {valid_name(name): parameter_text(value) for name, value in parameters.items()}
        for batch in batches(printable.items(), MAX_PARAMETERS_PER_BATCH):
            self._delivery.submit(partial(self._send_parameters, batch))
        if not self._delivery.wait_for_first_answer(START_TIMEOUT_SECONDS):
            self._note_failure(TimeoutError(f"no answer within {START_TIMEOUT_SECONDS:g} seconds"))
        return self._run_id

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records values at a step. What is not finite is recorded as not-a-number.

        MLflow would store an infinity as the largest double, which ruins the scale of a curve.
        """
        if self._delivery is None:
            return
        timestamp = int(time.time() * 1000)
        for name, value in metrics.items():
            number = float(value)
            self._pending.append(
                (valid_name(name), number if math.isfinite(number) else math.nan, timestamp, step)
            )
        due = time.monotonic() - self._last_flush >= FLUSH_SECONDS and self._delivery.idle
        if due or len(self._pending) >= MAX_METRICS_PER_BATCH:
            self._flush()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds facts about the run, or replaces those of the same name."""
        if self._delivery is not None:
            self._delivery.submit(partial(self._send_tags, dict(tags)))

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Keeps a copy of a file."""
        if self._delivery is not None:
            self._delivery.submit(
                lambda: self._connection.log_artifact(self._run_id, str(path), artifact_path),
                max_attempts=MAX_ARTIFACT_ATTEMPTS,
            )

    def log_directory(self, path: Path, artifact_path: str | None = None) -> None:
        """Keeps a copy of all that a directory holds."""
        if self._delivery is not None:
            self._delivery.submit(
                lambda: self._connection.log_artifacts(self._run_id, str(path), artifact_path),
                max_attempts=MAX_ARTIFACT_ATTEMPTS,
            )

    def finish(self, status: RunStatus) -> bool:
        """Sends what is left, sets the run's status and tells the user what could not be recorded.

        A second call waits for the first, from another thread too.
        """
        with self._finishing:
            self._finish(status)
            return self._has_all

    def _finish(self, status: RunStatus) -> None:
        if self._delivery is None:
            return
        self._flush()
        self._delivery.close(
            lambda: self._connection.set_terminated(self._run_id, status),
            FINISH_TIMEOUT_SECONDS,
            FINISH_TIMEOUT_AWAY_SECONDS,
        )
        missing, connected = self._delivery.num_undelivered, self._delivery.connected
        self._delivery = None
        self._has_all = not missing
        if missing:
            what = f"{missing} update{'s' if missing > 1 else ''} of the run" if connected else "the run"
            reason = f" ({self._last_error})" if self._last_error else ""
            verb = "were" if connected and missing > 1 else "was"
            self._warn(
                f"MLflow at {self._store.shown_uri}: {what} {verb} not recorded{reason}; "
                "metrics.jsonl in the run directory has every metric"
            )

    @property
    def _connection(self) -> Any:
        assert self._client is not None
        assert self._run_id is not None
        return self._client

    def _connect(self, run_name: str, tags: dict[str, str]) -> None:
        """Finds or makes the experiment and the run; may be repeated."""
        if self._client is None:
            self._client = open_store(self._store)
        run_id = self._continued_run(self._client, tags)
        if run_id is None:
            experiment_id = self._experiment_id(self._client)
            run_id = self._client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
        self._run_id = run_id

    def _continued_run(self, client: MlflowClient, tags: dict[str, str]) -> str | None:
        """Reopens the run to continue; None where there is none."""
        from mlflow.entities import RunTag
        from mlflow.exceptions import MlflowException

        if self._resumed_id is None:
            return None
        try:
            # Before it is running again, as whose it is says whether it is alive.
            client.log_batch(self._resumed_id, tags=[RunTag(*tag) for tag in tags.items()])
            client.update_run(self._resumed_id, status="RUNNING")
        except MlflowException as error:
            if is_passing(error):
                raise
            self._warn(
                f"MLflow at {self._store.shown_uri} cannot continue run {self._resumed_id} "
                f"({in_short(error)}): a new one is begun"
            )
            self._resumed_id = None
        return self._resumed_id

    def _experiment_id(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        found = find_experiment(client, self._store)
        if found is None:
            try:
                return str(client.create_experiment(self._store.experiment, self._store.artifact_location))
            except MlflowException as error:
                # Another run made it in the meantime.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = find_experiment(client, self._store)
                if found is None:
                    raise
        return found

    def _end_lost_runs(self) -> None:
        """Marks as killed the runs of this experiment whose processes, on this machine, are gone."""
        if self._process is None:
            return
        client, own = self._connection, self._process
        experiment = client.get_run(self._run_id).info.experiment_id
        running = f"attributes.status = 'RUNNING' AND tags.`{HOST_TAG}` = '{own.host}'"
        ended = []
        for run in client.search_runs([experiment], running, max_results=MAX_LOST_RUNS):
            process = Process.of_tags(run.data.tags)
            if run.info.run_id != self._run_id and process is not None and process.is_gone(own):
                client.set_terminated(run.info.run_id, "KILLED")
                ended.append(run.info.run_name)
        if ended:
            names = ", ".join(ended)
            self._warn(f"MLflow: {names}: killed, as the process is gone; the status says so now")

    def _send_parameters(self, batch: list[tuple[str, str]]) -> None:
        """A continued run keeps the parameters it has: MLflow lets none be changed."""
        from mlflow.entities import Param

        recorded = self._connection.get_run(self._run_id).data.params
        new = [Param(name, value) for name, value in batch if name not in recorded]
        self._connection.log_batch(self._run_id, params=new)

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self._connection.log_batch(self._run_id, tags=[RunTag(*tag) for tag in tags.items()])

    def _send_metrics(self, batch: list[_Metric]) -> None:
        from mlflow.entities import Metric

        self._connection.log_batch(self._run_id, metrics=[Metric(*metric) for metric in batch])

    def _flush(self) -> None:
        assert self._delivery is not None
        self._last_flush = time.monotonic()
        pending, self._pending = self._pending, []
        for batch in batches(pending, MAX_METRICS_PER_BATCH):
            self._delivery.submit(partial(self._send_metrics, batch))

    def _note_failure(self, error: Exception) -> None:
        """Warns of the first failure only; training must not scroll away under its tracker's troubles."""
        is_first = not self._last_error
        self._last_error = in_short(error)
        if is_first:
            self._warn(
                f"MLflow at {self._store.shown_uri}: {self._last_error}; training goes on, and "
                "metrics.jsonl in the run directory has every metric"
            )
