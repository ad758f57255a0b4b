"""Signals that ask a run to stop or to save, agreed over its ranks.

Clusters send SIGTERM before they take a machine away, people press Ctrl-C. The rank that is asked tells the
others at the next micro-batch, so that all of them stop at the same place. SIGUSR1 asks for a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.errors import SSMLoRAError

STOPPING = (signal.SIGTERM, signal.SIGINT)
# Ctrl-C reaches a rank twice: from the terminal, and as SIGTERM from the launcher, which it has reached too.
TOGETHER_SECONDS = 2.0


class StoppedError(SSMLoRAError):
    """A run that was told to stop, and has.

    Args:
        message: where it stands.
        signum: the signal.
    """

    label = "stopped"
    met_by_all = True

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequested(BaseException):
    """Raised by `Interrupts.check` on every rank; no error, and caught by the run alone."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


class Interrupts:
    """Takes over SIGTERM, SIGINT and SIGUSR1 from `__enter__` to `__exit__`; for the main thread.

    The first signal to stop is noted and a clock starts; what it leaves unfinished after `grace_seconds`, and
    what a second signal finds, ends at once: what is on the disk stays whole either way.

    Args:
        group: this run's processes.
        grace_seconds: from a signal to the end of the process.

    Attributes:
        save_requested: whether SIGUSR1 has reached a rank, as of the last `check`; to be reset by the run.
    """

    def __init__(self, group: ProcessGroup, grace_seconds: float) -> None:
        self.save_requested = False
        self._group, self._grace_seconds = group, grace_seconds
        self._stop, self._save = 0, False
        self._stopped_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for signum in STOPPING:
            self._before[signum] = signal.signal(signum, self._on_stop)
        self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_save)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop:
            # Still to come: the end of the run, which a signal must not cut short but the clock may.
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Asks all ranks for what has reached them; all of them must call it.

        Raises:
            StopRequested: one was told to stop.
        """
        stop, save = float(self._stop), float(self._save)
        if self._group.world_size > 1:
            stop, save = self._group.max([stop, save])
        self._save = False
        self.save_requested = self.save_requested or bool(save)
        if stop:
            self._note_stop(int(stop))
            raise StopRequested(int(stop))

    def _on_stop(self, signum: int, frame: FrameType | None) -> None:
        together = time.monotonic() - self._stopped_at < TOGETHER_SECONDS
        if self._stop and not (together and signum != self._stop):
            os._exit(128 + signum)
        if not self._stop:
            self._note_stop(signum)

    def _note_stop(self, signum: int) -> None:
        if self._stop:
            return
        self._stop, self._stopped_at = signum, time.monotonic()
        clock = threading.Timer(self._grace_seconds, self._time_is_over, [signum])
        clock.daemon = True
        clock.start()

    def _time_is_over(self, signum: int) -> None:
        if self._group.is_main:
            print(
                f"error: not ready to stop {self._grace_seconds:g} seconds after signal {signum} "
                "(checkpoint.grace_seconds); the last complete checkpoint stays: go on with --resume auto",
                file=sys.stderr,
                flush=True,
            )
        os._exit(128 + signum)

    def _on_save(self, signum: int, frame: FrameType | None) -> None:
        self._save = True
