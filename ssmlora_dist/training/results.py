"""What a run leaves once it has trained: adapter, curves and summary, on disk and at the tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ssmlora_dist.adapters.files import write_adapter
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.durable import explained
from ssmlora_dist.errors import CheckpointError, TrainingError
from ssmlora_dist.progress import progress
from ssmlora_dist.tracking import Console, RunDirectory, Store, Tracker, plot_curves
from ssmlora_dist.training.report import Scores, before_and_after


class ResultWriter:
    """Writes the results of a run; on rank 0.

    Args:
        config: of the run.
        directory: where they are written.
        tracker: that is given them too.
        store: of the tracker, if any.
        console: where they are shown.
        last_good: names the last checkpoint, for messages.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        tracker: Tracker,
        store: Store | None,
        console: Console,
        last_good: Callable[[], str],
    ) -> None:
        self._config, self._directory, self._tracker = config, directory, tracker
        self._store, self._console, self._last_good = store, console, last_good

    def save_adapter(
        self, tensors: Mapping[str, Tensor], base: Mapping[str, Any], base_fingerprint: str
    ) -> None:
        """Writes the adapter directory.

        Raises:
            TrainingError: the disk refuses it.
        """
        with self._explained(), progress("saving the adapter"):
            write_adapter(
                self._directory.adapter,
                self._config.adapter,
                tensors,
                base=base,
                base_fingerprint=base_fingerprint,
            )

    def finish(
        self,
        summary: dict[str, Any],
        before: Scores | None,
        after: Scores | None,
        without_states: Scores | None,
    ) -> None:
        """Draws the curves, writes the summary, and shows and tracks what there is.

        Raises:
            TrainingError: the disk refuses it.
        """
        with self._explained():
            self._directory.plots.mkdir(exist_ok=True)
            with progress("drawing the curves"):
                plot_curves(self._directory.read_metrics(), self._directory.plots / "curves.png")
            # Last, as it marks a run that is done.
            self._directory.write_summary(summary)
        if self._config.tracking.log_adapter:
            self._tracker.log_directory(self._directory.adapter, "adapter")
        self._tracker.log_directory(self._directory.plots, "plots")
        self._tracker.log_artifact(self._directory.summary_file)
        if before and after:
            self._console.print_before_after(before_and_after(before, after, without_states))
        uri = self._store.uri if self._store else None
        self._console.print_where_to_look(self._directory.path, self._directory.adapter, uri)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the disk refuses after training is no bad input, and loses nothing that a checkpoint has."""
        try:
            with explained(self._directory.path):
                yield
        except CheckpointError as error:
            raise TrainingError(f"{error}, and go on with --resume; {self._last_good()}") from error
