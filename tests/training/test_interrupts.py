"""Signals to this very process; tests/launch/test_signals.py has them sent to real runs."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from ssmlora_dist.signals import StopRequested
from ssmlora_dist.training import interrupts
from ssmlora_dist.training.interrupts import Interrupts, StoppedError

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
USR1, USR2 = signal.SIGUSR1, signal.SIGUSR2
LONG_SECONDS = 10.0
# In which a thread that has something to do does it, and one that must not, would.
A_MOMENT = 0.2


class Exits(list[int]):
    """The exit codes of what would have been the end of this process."""

    def wait(self) -> int:
        wait_until(lambda: len(self) > 0)
        return self[0]


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exits]:
    """Keeps this process alive, its handlers as they were, and no clock running."""
    codes = Exits()
    monkeypatch.setattr(os, "_exit", codes.append)
    entered: list[Interrupts] = []
    enter = Interrupts.__enter__

    def noted(watched: Interrupts) -> Interrupts:
        entered.append(watched)
        return enter(watched)

    monkeypatch.setattr(Interrupts, "__enter__", noted)
    before = {signum: signal.getsignal(signum) for signum in (INT, TERM, HUP, USR1, USR2)}
    # Whatever started the tests.
    signal.signal(HUP, signal.SIG_DFL)
    yield codes
    signal.set_wakeup_fd(-1)
    for signum, handler in before.items():
        signal.signal(signum, handler)
    for watched in entered:
        watched._told.close()
        watched._thread.join(LONG_SECONDS)
        assert not watched._thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def context(rank: int = 0, others: Sequence[float] | None = None) -> Any:
    """One of a run's processes; `others` is what has reached the other one."""

    def largest(values: Sequence[float]) -> list[float]:
        return [max(pair) for pair in zip(values, others or (), strict=True)]

    return SimpleNamespace(is_main=rank == 0, world_size=2 if others else 1, max=largest)


def send(*signums: int) -> None:
    """Sends signals to this process, each once the one before has been heard."""
    for signum in signums:
        os.kill(os.getpid(), signum)
        time.sleep(A_MOMENT)


@pytest.mark.parametrize("signum", [INT, TERM, HUP, USR2])
def test_a_signal_is_noted_and_raised_at_the_next_check(exits: Exits, signum: int) -> None:
    with Interrupts(context(), LONG_SECONDS) as watched:
        watched.check()
        send(signum)
        with pytest.raises(StopRequested) as raised:
            watched.check()
    assert raised.value.signum == signum
    assert exits == []


def test_a_request_to_save_is_heard_once() -> None:
    with Interrupts(context(), LONG_SECONDS) as watched:
        send(USR1)
        heard = [watched.save_requested]
        for _ in range(2):
            watched.check()
            heard.append(watched.save_requested)
            watched.save_requested = False
    assert heard == [False, True, False]


def test_what_has_reached_another_rank_counts(exits: Exits) -> None:
    with Interrupts(context(1, others=[0.0, 0.0, 0.0, 0.0, 1.0]), LONG_SECONDS) as watched:
        watched.check()
        assert watched.save_requested
    with Interrupts(context(1, others=[1.0, 0.0, 0.0, 0.0, 0.0]), LONG_SECONDS) as watched:
        with pytest.raises(StopRequested) as raised:
            watched.check()
        assert raised.value.signum == INT
        # The one that stops a run signals its ranks one after another: this rank's first signal is no second.
        send(INT)
        assert exits == []
        send(INT)
        assert exits == [128 + INT]


@pytest.mark.parametrize(
    "signums", [(INT, TERM), (TERM, TERM), (TERM, INT), (USR2, TERM), (TERM, USR2), (HUP, HUP), (TERM, HUP)]
)
def test_the_launchers_word_beside_the_signal_is_no_second_one(
    exits: Exits, monkeypatch: pytest.MonkeyPatch, signums: tuple[int, int]
) -> None:
    monkeypatch.setattr(interrupts, "TOGETHER_SECONDS", LONG_SECONDS)
    with Interrupts(context(), LONG_SECONDS) as watched:
        send(*signums)
        with pytest.raises(StopRequested) as raised:
            watched.check()
    # Of Ctrl-C and what a launcher makes of it either may be first, here and on other ranks.
    assert raised.value.signum == next((signum for signum in signums if signum != TERM), TERM)
    assert exits == []


def test_ctrl_c_that_has_reached_one_rank_is_what_all_stop_by() -> None:
    with Interrupts(context(1, others=[1.0, 0.0, 0.0, 0.0, 0.0]), LONG_SECONDS) as watched:
        send(TERM)
        with pytest.raises(StopRequested) as raised:
            watched.check()
    assert raised.value.signum == INT


def test_what_is_to_outlive_its_terminal_does() -> None:
    signal.signal(HUP, signal.SIG_IGN)
    with Interrupts(context(), LONG_SECONDS) as watched:
        send(HUP)
        watched.check()


def test_ctrl_c_twice_ends_at_once(exits: Exits) -> None:
    with Interrupts(context(), LONG_SECONDS):
        send(INT, INT)
    assert exits == [128 + INT]


@pytest.mark.parametrize("signums", [(INT, TERM), (TERM, TERM), (TERM, INT)])
def test_a_later_second_signal_ends_at_once(
    exits: Exits, monkeypatch: pytest.MonkeyPatch, signums: tuple[int, int]
) -> None:
    monkeypatch.setattr(interrupts, "TOGETHER_SECONDS", 0.0)
    with Interrupts(context(), LONG_SECONDS):
        send(*signums)
    assert exits == [128 + signums[1]]


@pytest.mark.parametrize("rank", [0, 1])
def test_when_the_time_is_over_the_process_ends(
    exits: Exits, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    began = time.monotonic()
    with Interrupts(context(rank), 0.5):
        send(TERM)
        assert exits == []
        assert exits.wait() == 128 + TERM
    assert time.monotonic() - began >= 0.5
    said = capsys.readouterr().err
    if rank:
        assert said == ""
    else:
        assert said.startswith(
            "error: not ready to stop 0.5 seconds after SIGTERM (checkpoint.grace_seconds); "
        )
        assert said.endswith("go on with --resume auto\n")


def test_the_time_of_a_rank_that_got_no_signal_runs_too(exits: Exits) -> None:
    with Interrupts(context(1, others=[0.0, 0.0, 0.0, 1.0, 0.0]), 0.1) as watched:
        with pytest.raises(StopRequested):
            watched.check()
        assert exits.wait() == 128 + TERM


def test_the_time_runs_while_the_main_thread_runs_no_python(
    exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In native code no handler of Python's is called."""
    ended_at: list[float] = []
    monkeypatch.setattr(os, "_exit", lambda code: ended_at.append(time.monotonic()))
    with Interrupts(context(), 0.1):
        threading.Timer(A_MOMENT, os.kill, (os.getpid(), TERM)).start()
        # A second or more, in one call.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)
        assert ended_at
        assert ended_at[0] < time.monotonic() - A_MOMENT


def test_without_a_signal_all_is_as_before() -> None:
    before = [signal.getsignal(signum) for signum in (INT, TERM, USR1)]
    threads = threading.active_count()
    with Interrupts(context(), LONG_SECONDS):
        assert [signal.getsignal(signum) for signum in (INT, TERM, USR1)] != before
    assert [signal.getsignal(signum) for signum in (INT, TERM, USR1)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_once_a_run_has_stopped_no_signal_cuts_its_end_short_but_the_clock_does(
    exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupts, "TOGETHER_SECONDS", 0.0)
    with Interrupts(context(), 5 * A_MOMENT):
        send(TERM)
    send(TERM, INT, USR1)
    assert exits == []
    assert exits.wait() == 128 + TERM


@pytest.mark.parametrize(("signum", "exit_code"), [(INT, 130), (TERM, 143), (HUP, 129), (USR2, 140)])
def test_the_exit_code_names_the_signal(signum: int, exit_code: int) -> None:
    error = StoppedError("after step 7", signum)
    assert (str(error), error.exit_code, error.label) == ("after step 7", exit_code, "stopped")
