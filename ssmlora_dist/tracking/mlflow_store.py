"""Reaching an MLflow store: what can be found out before a run, and making one that is not there."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ssmlora_dist.durable import sync
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.progress import progress
from ssmlora_dist.tracking.limits import in_short
from ssmlora_dist.tracking.store import ID_VARIABLE, NAME_VARIABLE, Store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

START_TIMEOUT_SECONDS = 30.0

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


def is_installed() -> bool:
    """Whether there is an MLflow to record with."""
    return importlib.util.find_spec("mlflow") is not None


def import_mlflow() -> None:
    """Imports MLflow, told to be quiet and not to wait too long."""
    for variable, value in _ENVIRONMENT_DEFAULTS.items():
        os.environ.setdefault(variable, value)
    for name in _CHATTY_LOGGERS:
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.ERROR)
    import mlflow.tracking  # noqa: F401

    # Again, because MLflow reads the variable only if this was its first import.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())


def check_store(store: Store, warn: Callable[[str], object]) -> None:
    """Finds out before any long work whether runs can be recorded; nothing is made or written.

    A server or database that gives no answer now may give one later: that is a warning.

    Args:
        store: where runs are to be recorded.
        warn: shows one line to the user.

    Raises:
        ConfigError: the store or the experiment is none that will ever take a run.
    """
    if (problem := store.problem()) is not None:
        raise ConfigError([problem])
    file = store.sqlite_file
    is_new = file is not None and not file.exists()
    if not is_installed() or (is_new and store.experiment_id is None):
        return
    if is_new:
        raise _no_such_experiment(store)
    try:
        with progress(f"looking for the experiment at {store.shown_uri}"):
            _ask(store)
    except ConfigError:
        raise
    # Of several libraries, with classes of their own.
    except Exception as error:
        if not is_passing(error):
            shown = json.dumps(store.shown_uri, ensure_ascii=False)
            raise ConfigError([f"{store.uri_from}: {shown} given; {_reason_and_remedy(error)}"]) from None
        warn(
            f"MLflow at {store.shown_uri} is away ({in_short(error)}); training goes on without it, and what "
            "it is to record is sent again and again; metrics.jsonl in the run directory has every metric"
        )


def _ask(store: Store) -> None:
    """Looks for the experiment, within a bounded time."""
    # Here, as importing on two threads at once can deadlock.
    import_mlflow()
    failures: list[Exception] = []

    def ask() -> None:
        from mlflow.tracking import MlflowClient

        try:
            find_experiment(MlflowClient(tracking_uri=store.uri), store)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask, name="check of the store", daemon=True)
    thread.start()
    thread.join(START_TIMEOUT_SECONDS)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {START_TIMEOUT_SECONDS:g} seconds")
    for error in failures:
        raise error


def open_store(store: Store) -> MlflowClient:
    """A client of the store, which is made where it is a file that is not there.

    It is made whole or not at all: MLflow makes its tables one after another in place, where runs that begin
    at once would trip over each other, and one that is killed would leave half of them.
    """
    from mlflow.tracking import MlflowClient

    file = store.sqlite_file
    if file is not None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial").absolute()
        try:
            with _hasty_sqlite():
                MlflowClient(tracking_uri=f"sqlite:///{beside}").search_experiments(max_results=1)
            sync(beside)
            _put(beside, file)
        finally:
            beside.unlink(missing_ok=True)
    return MlflowClient(tracking_uri=store.uri)


@contextmanager
def _hasty_sqlite() -> Iterator[None]:
    """Lets new connections to sqlite files wait for no disk: for files that nobody needs if they get lost."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def relax(connection: object, record: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", relax)
    try:
        yield
    finally:
        event.remove(Engine, "connect", relax)


def _put(beside: Path, file: Path) -> None:
    """Gives a file its name, unless another run was faster."""
    try:
        os.link(beside, file)
    except FileExistsError:
        pass
    except OSError:
        # A file system without links.
        if not file.exists():
            os.rename(beside, file)


def find_experiment(client: MlflowClient, store: Store) -> str | None:
    """The number of the experiment; None where it is yet to be made.

    Raises:
        ConfigError: it is deleted, or is none that exists.
    """
    from mlflow.exceptions import MlflowException

    if store.experiment_id is None:
        found = client.get_experiment_by_name(store.experiment)
        if found is None:
            return None
    else:
        try:
            found = client.get_experiment(store.experiment_id)
        except MlflowException as error:
            if is_passing(error):
                raise
            raise _no_such_experiment(store) from None
        if store.experiment not in (None, found.name):
            problem = (
                f'{ID_VARIABLE}: {store.experiment_id} given, which is "{found.name}", with {NAME_VARIABLE} '
            )
            raise ConfigError([f"{problem}{store.experiment}; allowed: one experiment; unset one of them"])
    if found.lifecycle_stage != "active":
        problem = f'{store.experiment_from}: experiment "{found.name}" is deleted in {store.shown_uri}'
        restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
        raise ConfigError([f"{problem}; name another with tracking.experiment, or restore it: {restore}"])
    return str(found.experiment_id)


def is_passing(error: Exception) -> bool:
    """Whether a failed call may succeed later: the store is away or busy, rather than turning it down."""
    from mlflow.exceptions import InvalidUrlException, MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return error.error_code in _PASSING_ERROR_CODES and not isinstance(error, InvalidUrlException)
    return isinstance(error, RequestException | ConnectionError | TimeoutError | OperationalError)


def _no_such_experiment(store: Store) -> ConfigError:
    problem = f"{ID_VARIABLE}: {store.experiment_id} given; {store.shown_uri} has no such experiment"
    return ConfigError([f"{problem}; name one with tracking.experiment, or unset it"])


def _reason_and_remedy(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"needed: the package {error.name}, by which MLflow reaches it; install it"
    if type(error).__name__ == "UnsupportedModelRegistryStoreURIException":
        return "allowed: http://HOST:PORT, sqlite:///FILE or another of MLflow's kinds of stores; write one"
    return f"MLflow cannot use it: {in_short(error)}; correct it"
