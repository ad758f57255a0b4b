"""The signals that stop a command, of whatever kind, and what they make of its exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

# Of several that come together the first is what was sent: launchers make SIGTERM of it.
STOPPING = (signal.SIGINT, signal.SIGUSR2, signal.SIGHUP, signal.SIGTERM)


class StopRequested(BaseException):
    """A signal has told the command to stop; no error, and nothing that catches errors catches it.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def stop_signals() -> list[signal.Signals]:
    """Those of `STOPPING` that are not ignored: what is to outlive its terminal (`nohup`) ignores SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signum for signum in STOPPING if not (ignored and signum == signal.SIGHUP)]


@contextmanager
def raise_on_stop_signals() -> Iterator[None]:
    """Has signals that would end the process raise `StopRequested`; Ctrl-C stays a KeyboardInterrupt.

    What is open is closed, and the exit code names the signal, also to a launcher. SIGUSR1, a request to
    save, must not end what has nothing to save yet. Handlers that have been replaced meanwhile stay.
    """
    own: dict[int, Any] = {signum: _raise for signum in stop_signals() if signum != signal.SIGINT}
    own[signal.SIGUSR1] = signal.SIG_IGN
    before = {signum: signal.signal(signum, handler) for signum, handler in own.items()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if signal.getsignal(signum) is own[signum]:
                signal.signal(signum, handler)


def _raise(signum: int, frame: FrameType | None) -> NoReturn:
    raise StopRequested(signum)
