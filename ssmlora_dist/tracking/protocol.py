"""What training asks of an experiment tracker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

Scalar = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Records one run. No method raises, and none but `start` and `finish` waits for anything.

    Only rank 0 has a tracker that records; the other ranks have a `NullTracker`.
    """

    @property
    def run_id(self) -> str | None:
        """The run's id at the tracker; None as long as it has none."""

    def start(self, run_name: str, parameters: Mapping[str, Scalar], tags: Mapping[str, str]) -> str | None:
        """Begins the run, or continues the one that the tracker was made for.

        Args:
            run_name: the name that people see.
            parameters: what the run was configured with, flat (see `flat_parameters`).
            tags: further facts about the run.

        Returns:
            The run id; None when the tracker has not answered yet or does not record.
        """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Records values at a step of the optimiser."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Adds facts about the run, or replaces those of the same name."""

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Keeps a copy of a file, in the folder `artifact_path` of the run's artifacts.

        The copy may be made later: the file must stay as it is until `finish` has returned.
        """

    def log_directory(self, path: Path, artifact_path: str | None = None) -> None:
        """Keeps a copy of all that a directory holds, as `log_artifact` does."""

    def finish(self, status: RunStatus) -> bool:
        """Sends what is left and closes the run with its true status; False if anything is missing there."""


class NullTracker:
    """Records nothing: for `tracker: "none"` and for every rank but the first."""

    run_id: str | None = None

    def start(self, run_name: str, parameters: Mapping[str, Scalar], tags: Mapping[str, str]) -> str | None:
        """Returns None."""
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Does nothing."""

    def log_artifact(self, path: Path, artifact_path: str | None = None) -> None:
        """Does nothing."""

    def log_directory(self, path: Path, artifact_path: str | None = None) -> None:
        """Does nothing."""

    def finish(self, status: RunStatus) -> bool:
        """Does nothing."""
        return True


def flat_parameters(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested mappings as one level of dotted names; sequences become JSON text, other objects their `str`."""
    flat: dict[str, Scalar] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flat_parameters(value, f"{name}."))
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            flat[name] = json.dumps(value, default=str)
        elif value is None or isinstance(value, str | int | float | bool):
            flat[name] = value
        else:
            flat[name] = str(value)
    return flat
