"""Writing checkpoints while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.training.checkpoints import Checkpoint, prune, write_checkpoint


class BackgroundWriter:
    """Writes one checkpoint at a time, in a thread of its own, and deletes those no longer wanted.

    A save that fails is a warning, and the checkpoints before it stay.

    Args:
        directory: of the run's checkpoints.
        adapter_config: of the adapters.
        base: how to load the base model, as for `write_adapter`.
        keep: how many of the newest to keep.
        keep_best: whether to keep the one of the least validation loss beyond these.
        warn: told what went wrong, on the writing thread.
        on_written: told of every checkpoint that is whole on the disk, on the writing thread.
        last_good: the checkpoint that the run goes on from.

    Attributes:
        last_good: directory of the newest checkpoint that is whole on the disk, if any.
        last_error: why the last save failed; None if it did not.
    """

    def __init__(
        self,
        directory: Path,
        adapter_config: AdapterConfig,
        base: Mapping[str, Any],
        *,
        keep: int,
        keep_best: bool,
        warn: Callable[[str], object],
        on_written: Callable[[Path], object] = lambda path: None,
        last_good: Path | None = None,
    ) -> None:
        self.last_good = last_good
        self.last_error: str | None = None
        self._directory = directory
        self._adapter_config = adapter_config
        self._base = base
        self._keep, self._keep_best = keep, keep_best
        self._warn, self._on_written = warn, on_written
        self._thread: threading.Thread | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begins to write, once the write before is done.

        Args:
            checkpoint: of tensors that nobody changes any more: copies, in host memory.
        """
        self.wait()
        # Not a daemon: the interpreter does not end before what was begun is on the disk.
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Waits until nothing is being written; False when that takes longer than `timeout_seconds`."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            path = write_checkpoint(self._directory, checkpoint, self._adapter_config, self._base)
            self.last_good = path
            self._on_written(path)
            prune(self._directory, path, keep=self._keep, keep_best=self._keep_best)
            self.last_error = None
        # Whatever it is, training is worth more than this save.
        except Exception as error:
            self.last_error = str(error)
            stands = f"the last good one is {self.last_good}" if self.last_good else "there is none before it"
            self._warn(f"checkpoint of step {checkpoint.step}: {error}; training goes on, {stands}")
