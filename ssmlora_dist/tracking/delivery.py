"""Calls to a service that may be slow or away, made from a thread of their own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 60.0
# A call holds at most one batch of metrics, so this bounds what a service that stays away costs in memory.
MAX_WAITING_CALLS = 500


class _Call(NamedTuple):
    function: Callable[[], object]
    max_attempts: int | None


class Delivery:
    """Makes calls in the order they were handed in, and repeats those that fail for a passing reason.

    The caller never waits for the service: it hands calls in with `submit` and asks at the end, with
    `close`, how many could not be made. While the service is away the calls wait; when too many wait, new
    ones are refused and counted.

    Args:
        connect: the first call, repeated until it succeeds. When it is turned down, nothing else is tried.
        is_passing: whether a call that raised this may succeed later.
        on_failure: told of every failed attempt, on the delivering thread.
    """

    def __init__(
        self,
        connect: Callable[[], object],
        is_passing: Callable[[Exception], bool],
        on_failure: Callable[[Exception], object],
    ) -> None:
        self.num_undelivered = 0
        self.connected = False
        self._is_passing = is_passing
        self._on_failure = on_failure
        self._calls: deque[_Call] = deque()
        self._condition = threading.Condition()
        self._first_answer = threading.Event()
        self._busy = True
        self._away = True
        self._turned_down = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, args=(connect,), name="delivery", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether every call handed in so far has been made."""
        with self._condition:
            return not self._calls and not self._busy

    def wait_for_first_answer(self, timeout_seconds: float) -> bool:
        """Waits until `connect` has succeeded or failed once; False when it has done neither by then."""
        return self._first_answer.wait(timeout_seconds)

    def submit(self, function: Callable[[], object], max_attempts: int | None = None) -> None:
        """Hands in a call; `max_attempts` keeps one that goes on failing from holding up those behind it."""
        with self._condition:
            if self._turned_down or self._closing or len(self._calls) >= MAX_WAITING_CALLS:
                self.num_undelivered += 1
                return
            self._calls.append(_Call(function, max_attempts))
            self._condition.notify_all()

    def close(self, last: Callable[[], object], timeout_seconds: float, timeout_away_seconds: float) -> None:
        """Gives every waiting call one more attempt, within a time limit, and counts what was not made.

        Args:
            last: a final call, taken however many are waiting.
            timeout_seconds: how long to wait for a service that answers.
            timeout_away_seconds: how long to wait for one whose last answer was a failure, or none.
        """
        with self._condition:
            if self._turned_down:
                self.num_undelivered += 1
            else:
                self._calls.append(_Call(last, None))
            self._closing = True
            self._condition.notify_all()
        began = time.monotonic()
        while self._thread.is_alive():
            limit = timeout_away_seconds if self._away else timeout_seconds
            if time.monotonic() - began >= limit:
                break
            self._thread.join(0.05)
        with self._condition:
            self.num_undelivered += len(self._calls) + int(self._thread.is_alive() and self._busy)
            self._calls.clear()

    def _run(self, connect: Callable[[], object]) -> None:
        self.connected = self._make(_Call(connect, None))
        self._first_answer.set()
        if not self.connected:
            with self._condition:
                self._turned_down = True
                self._busy = False
                self.num_undelivered += len(self._calls)
                self._calls.clear()
            return
        while True:
            with self._condition:
                self._busy = False
                self._condition.wait_for(lambda: self._calls or self._closing)
                if not self._calls:
                    return
                call = self._calls.popleft()
                self._busy = True
            if not self._make(call):
                with self._condition:
                    self.num_undelivered += 1

    def _make(self, call: _Call) -> bool:
        """Attempts one call until it succeeds, is turned down or the delivery closes."""
        pause = FIRST_PAUSE_SECONDS
        attempts = 0
        while True:
            closing = self._closing
            try:
                call.function()
            except Exception as error:
                attempts += 1
                passing = self._is_passing(error)
                self._away = passing or self._away
                self._on_failure(error)
                self._first_answer.set()
                if not passing or closing or attempts == call.max_attempts:
                    return False
            else:
                self._away = False
                return True
            with self._condition:
                self._condition.wait_for(lambda: self._closing, timeout=pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
