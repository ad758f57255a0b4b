"""Signals that ask a run to stop or to save, agreed over its ranks.

Clusters send SIGTERM or SIGUSR2 before they take a machine away, people press Ctrl-C or close a terminal
(SIGHUP, unless it is ignored: `nohup`). The rank that is asked tells the
others at the next micro-batch, so that all of them stop at the same place. SIGUSR1 asks for a checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.errors import SSMLoRAError
from ssmlora_dist.signals import STOPPING, StopRequested, stop_signals

# One request reaches a rank twice where it reaches the launcher too, which hands it on, Ctrl-C as SIGTERM.
TOGETHER_SECONDS = 2.0
# No signal, but the news that another rank has got one.
_AGREED = 0


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


class Interrupts:
    """Takes over the signals to stop and SIGUSR1 from `__enter__` to `__exit__`; for the main thread.

    The first signal to stop is noted and a clock starts; what it leaves unfinished after `grace_seconds`, and
    what a second signal to the same rank finds, ends at once: what is on the disk stays whole either way. A
    thread of its own sees to that, as the main thread may be in a long computation or a collective that never
    ends.

    Args:
        context: this run's processes.
        grace_seconds: from a signal to the end of the process.

    Attributes:
        save_requested: whether SIGUSR1 has reached a rank, as of the last `check`; to be reset by the run.
    """

    def __init__(self, context: DistributedContext, grace_seconds: float) -> None:
        self.save_requested = False
        self._context, self._grace_seconds = context, grace_seconds
        self._stop, self._save = 0, False
        self._asked_at = 0.0
        self._stopped = False
        # The first signal to stop that this rank itself has got, and when.
        self._own, self._own_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._told, self._heard = socket.socketpair()
        self._told.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="interrupts", daemon=True)
        self._thread.start()
        # Written to as the signal comes, whatever the main thread is doing.
        self._descriptor_before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        for signum in (*stop_signals(), signal.SIGUSR1):
            self._before[signum] = signal.signal(signum, _go_on)
        return self

    def __exit__(self, *_: object) -> None:
        if self._stop:
            # Still to come: the end of the process, which no signal cuts short any more, but the clock may.
            self._stopped = True
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._descriptor_before)
        self._told.close()
        self._thread.join()
        self._heard.close()

    def check(self) -> None:
        """Asks all ranks for what has reached them; all of them must call it.

        Raises:
            StopRequested: one was told to stop.
        """
        asked = [*(self._stop == signum for signum in STOPPING), self._save]
        if self._context.world_size > 1:
            asked = [bool(value) for value in self._context.max([float(value) for value in asked])]
        *stops, save = asked
        if save:
            self._save, self.save_requested = False, True
        if any(stops):
            signum = STOPPING[stops.index(True)]
            self._note_stop(signum)
            # The clock.
            self._told.send(bytes([_AGREED]))
            raise StopRequested(signum)

    def _listen(self) -> None:
        while True:
            if self._stop:
                remaining = self._asked_at + self._grace_seconds - time.monotonic()
                # Not 0, which would make the socket one that never waits.
                self._heard.settimeout(max(0.001, remaining))
            try:
                signums = self._heard.recv(64)
            except TimeoutError:
                self._time_is_over()
                return
            if not signums:
                return
            for signum in signums:
                if signum == signal.SIGUSR1:
                    self._save = True
                elif signum in STOPPING:
                    self._on_stop(signum)

    def _on_stop(self, signum: int) -> None:
        now = time.monotonic()
        # Not what the other ranks have got: whoever stops a run signals all of them, one after another.
        if not self._own:
            self._own, self._own_at = signum, now
            self._note_stop(signum)
        # Ctrl-C twice is a person, who means it.
        elif not self._stopped and (
            now - self._own_at > TOGETHER_SECONDS or self._own == signum == signal.SIGINT
        ):
            os._exit(128 + signum)
        elif not self._stopped and STOPPING.index(signum) < STOPPING.index(self._own):
            # It has come together with the launcher's word of it, which has overtaken it.
            self._own = self._stop = signum

    def _note_stop(self, signum: int) -> None:
        if not self._stop:
            self._asked_at = time.monotonic()
            self._stop = signum

    def _time_is_over(self) -> None:
        if self._context.is_main:
            print(
                f"error: not ready to stop {self._grace_seconds:g} seconds after "
                f"{signal.Signals(self._stop).name} (checkpoint.grace_seconds); the last complete checkpoint "
                "stays: go on with --resume auto",
                file=sys.stderr,
                flush=True,
            )
        os._exit(128 + self._stop)


def _go_on(signum: int, frame: FrameType | None) -> None:
    """What Python itself does at a signal that `Interrupts` hears of by other means."""
