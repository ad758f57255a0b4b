from __future__ import annotations

import os
import signal

import pytest

from ssmlora_dist.sweep.signals import StopSignals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_is_noted_and_the_handler_that_was_there_comes_back(signum: int) -> None:
    def own(*_: object) -> None:
        raise AssertionError("the sweep's handler was not there")

    # Tests may have been started to outlive a terminal, too.
    before = signal.signal(signum, own)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)
            assert signals.stopped_by == signum
            # Both came at once: one request.
            assert not signals.is_urgent
        assert signal.getsignal(signum) == own
    finally:
        signal.signal(signum, before)


def test_what_is_to_outlive_its_terminal_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.stopped_by is None
    finally:
        signal.signal(signal.SIGHUP, before)
