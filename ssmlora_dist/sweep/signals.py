"""The signals that stop a sweep."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

from ssmlora_dist.signals import stop_signals

# One request reaches the sweep twice where whoever stops it signals its group and itself.
TOGETHER_SECONDS = 1.0


class StopSignals:
    """Notes the signals to stop (`signals.STOPPING`) while it is entered; for the main thread.

    Attributes:
        stopped_by: the first of them; None: none has come.
        is_urgent: whether another one has come later, of somebody who does not want to wait.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.is_urgent = False
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for signum in stop_signals():
            self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stopped_by is None:
            self.stopped_by, self._at = signum, now
        elif now - self._at > TOGETHER_SECONDS:
            self.is_urgent = True
