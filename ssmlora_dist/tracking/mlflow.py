"""Runs recorded in MLflow: a local sqlite file by default, or any server by its URI.

Everything that talks to MLflow happens on one background thread (`Delivery`), so that a slow or dead server
never slows training; the client is used without MLflow's global state.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmlora_dist.tracking.delivery import Delivery
from ssmlora_dist.tracking.protocol import NullTracker, RunStatus, Scalar, Tracker

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# MLflow refuses longer values and names and larger batches. A batch of parameters stays far below its limit
# of 100: each may have the longest value, and a request may not pass one megabyte.
MAX_PARAMETER_LENGTH = 6000
MAX_NAME_LENGTH = 250
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMETERS_PER_BATCH = 20

FLUSH_SECONDS = 5.0
START_TIMEOUT_SECONDS = 30.0
FINISH_TIMEOUT_SECONDS = 120.0
FINISH_TIMEOUT_AWAY_SECONDS = 10.0
# A file that the artifact store goes on refusing must not hold up the metrics behind it.
MAX_ARTIFACT_ATTEMPTS = 3

# MLflow's own patience (7 retries of 120 seconds) is for callers that have nothing else to fall back on.
# A training node calls nobody unasked: no telemetry. Each can be set otherwise in the environment.
_ENVIRONMENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_CHATTY_LOGGERS = ("alembic", "urllib3.connectionpool")
_PASSING_ERROR_CODES = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
_DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")

_Metric = tuple[str, float, int, int]


def store_uri(output_dir: Path, uri: str | None = None) -> str:
    """Where runs are recorded: the URI given, else `mlflow.db` in the output directory."""
    return uri or f"sqlite:///{output_dir.resolve() / 'mlflow.db'}"


def mlflow_tracker(
    output_dir: Path,
    uri: str | None,
    experiment: str,
    warn: Callable[[str], object],
    run_id: str | None = None,
) -> Tracker:
    """A tracker for one run on this process; a `NullTracker`, with a warning, where MLflow is not installed.

    Args:
        output_dir: holds `mlflow.db` and `mlartifacts/` when no URI is given.
        uri: a server or database; authentication comes from MLflow's environment variables.
        experiment: the experiment's name; made when it does not exist.
        warn: shows one line to the user; may be called from another thread.
        run_id: the run to continue; a new run is begun where the store has no such run.
    """
    if importlib.util.find_spec("mlflow") is None:
        warn(
            "MLflow is not installed: metrics go to metrics.jsonl only; "
            'install it with `pip install mlflow`, or set tracking.tracker to "none"'
        )
        return NullTracker()
    location = store_uri(output_dir, uri)
    return MLflowTracker(location, experiment, warn, _artifact_location(location, output_dir), run_id)


class MLflowTracker:
    """Records one run with MLflow; see `Tracker` for what the methods do.

    Metrics are sent in batches, every few seconds. What could not be sent is tried again as long as the run
    lasts; the user is warned once, and told at the end what is missing.

    Args:
        uri: of the store.
        experiment: name.
        warn: shows one line to the user; also called from the background thread.
        artifact_location: where a new experiment keeps its files; None leaves it to the server.
        run_id: the run to continue.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        warn: Callable[[str], object],
        artifact_location: str | None = None,
        run_id: str | None = None,
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._warn = warn
        self._artifact_location = artifact_location
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
        for variable, value in _ENVIRONMENT_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        for name in _CHATTY_LOGGERS:
            if logging.getLogger(name).level == logging.NOTSET:
                logging.getLogger(name).setLevel(logging.ERROR)
        try:
            # Imported on the calling thread: importing on two threads at once can deadlock.
            import mlflow.tracking  # noqa: F401

            # Again, because MLflow reads the variable only if this was its first import.
            logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
        except Exception as error:
            self._warn(f"MLflow cannot be imported ({_in_short(error)}): metrics go to metrics.jsonl only")
            return None
        self._delivery = Delivery(
            lambda: self._connect(run_name, dict(tags)), _is_passing, self._note_failure
        )
        printable = {_valid_name(name): _parameter_text(value) for name, value in parameters.items()}
        for batch in _batches(printable.items(), MAX_PARAMETERS_PER_BATCH):
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
                (_valid_name(name), number if math.isfinite(number) else math.nan, timestamp, step)
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
                f"MLflow at {_without_credentials(self._uri)}: {what} {verb} not recorded{reason}; "
                "metrics.jsonl in the run directory has every metric"
            )

    @property
    def _connection(self) -> Any:
        assert self._client is not None
        assert self._run_id is not None
        return self._client

    def _connect(self, run_name: str, tags: dict[str, str]) -> None:
        """Finds or makes the experiment and the run; may be repeated."""
        from mlflow.tracking import MlflowClient

        if self._client is None:
            self._client = MlflowClient(tracking_uri=self._uri)
        run_id = self._run_id or self._continued_run(self._client)
        if run_id is not None:
            self._run_id = run_id
            self._send_tags(tags)
        else:
            experiment_id = self._experiment_id(self._client)
            run_id = self._client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id
        self._run_id = run_id

    def _continued_run(self, client: MlflowClient) -> str | None:
        """Reopens the run to continue; None where there is none."""
        from mlflow.exceptions import MlflowException

        if self._resumed_id is None:
            return None
        try:
            client.update_run(self._resumed_id, status="RUNNING")
        except MlflowException as error:
            if _is_passing(error):
                raise
            self._warn(
                f"MLflow at {_without_credentials(self._uri)} cannot continue run {self._resumed_id} "
                f"({_in_short(error)}): a new one is begun"
            )
            self._resumed_id = None
        return self._resumed_id

    def _experiment_id(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            try:
                return str(client.create_experiment(self._experiment, self._artifact_location))
            except MlflowException as error:
                # Another run made it in the meantime.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(self._experiment)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

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
        for batch in _batches(pending, MAX_METRICS_PER_BATCH):
            self._delivery.submit(partial(self._send_metrics, batch))

    def _note_failure(self, error: Exception) -> None:
        """Warns of the first failure only; training must not scroll away under its tracker's troubles."""
        is_first = not self._last_error
        self._last_error = _in_short(error)
        if is_first:
            self._warn(
                f"MLflow at {_without_credentials(self._uri)}: {self._last_error}; training goes on, and "
                "metrics.jsonl in the run directory has every metric"
            )


def _artifact_location(uri: str, output_dir: Path) -> str | None:
    """A folder beside the database; without one MLflow would write into the current directory."""
    scheme, _, rest = uri.partition("://")
    if not scheme.startswith(_DATABASE_SCHEMES):
        return None
    directory = Path(rest.removeprefix("/")).resolve().parent if scheme == "sqlite" else output_dir.resolve()
    return (directory / "mlartifacts").as_uri()


def _is_passing(error: Exception) -> bool:
    """Whether a failed call may succeed later: the store is away or busy, rather than turning it down."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    if isinstance(error, MlflowException):
        return error.error_code in _PASSING_ERROR_CODES
    return isinstance(error, RequestException | ConnectionError | TimeoutError)


def _valid_name(name: str) -> str:
    """A name of the characters and the length that MLflow takes on every platform."""
    return re.sub(r"[^\w.\-/ ]", "_", name)[:MAX_NAME_LENGTH]


def _parameter_text(value: Scalar) -> str:
    text = str(value)
    if len(text) <= MAX_PARAMETER_LENGTH:
        return text
    mark = f" ... [cut: {len(text)} characters]"
    return text[: MAX_PARAMETER_LENGTH - len(mark)] + mark


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    everything = list(items)
    for first in range(0, len(everything), size):
        yield everything[first : first + size]


def _in_short(error: Exception) -> str:
    """The first line of an error, of a length that a person reads, without passwords."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    # urllib3 puts the cause, in brackets, at the end of a long account of the request.
    cause = re.search(r"\(Caused by (.*)\)$", line)
    line = _without_credentials(cause.group(1) if cause else line)
    return line if len(line) <= 200 else f"{line[:197]}..."


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", text)
