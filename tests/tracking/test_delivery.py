from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from ssmlora_dist.tracking import delivery
from ssmlora_dist.tracking.delivery import Delivery

LONG_SECONDS = 10.0


class Away(Exception):
    """A failure that passes."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE_SECONDS", 0.01)


def failing(times: int, error: Exception, then: Callable[[], object] = lambda: None) -> Callable[[], object]:
    """A call that raises so many times and then succeeds."""
    left = [times]

    def call() -> object:
        if left[0]:
            left[0] -= 1
            raise error
        return then()

    return call


def delivery_to(connect: Callable[[], object], failures: list[Exception]) -> Delivery:
    return Delivery(connect, lambda error: isinstance(error, Away), failures.append)


def test_a_service_that_comes_back_gets_every_call_in_order() -> None:
    made: list[int] = []
    failures: list[Exception] = []
    sent = delivery_to(failing(2, Away()), failures)
    for number in range(5):
        sent.submit(failing(number % 2, Away(), lambda number=number: made.append(number)))
    deadline = time.monotonic() + LONG_SECONDS
    while not sent.idle and time.monotonic() < deadline:
        time.sleep(0.01)
    sent.close(lambda: made.append(5), LONG_SECONDS, LONG_SECONDS)
    assert made == [0, 1, 2, 3, 4, 5]
    assert sent.num_undelivered == 0
    assert len(failures) == 4


def test_a_call_that_is_turned_down_is_counted_and_holds_up_nothing() -> None:
    made: list[str] = []
    failures: list[Exception] = []
    sent = delivery_to(lambda: None, failures)
    sent.submit(failing(1, ValueError("never")))
    sent.submit(failing(9, Away()), max_attempts=2)
    sent.submit(lambda: made.append("later"))
    sent.close(lambda: made.append("last"), LONG_SECONDS, LONG_SECONDS)
    assert made == ["later", "last"]
    assert sent.num_undelivered == 2


def test_nothing_is_tried_after_the_connection_was_turned_down() -> None:
    made: list[str] = []
    sent = delivery_to(failing(1, ValueError("who are you")), [])
    assert sent.wait_for_first_answer(LONG_SECONDS)
    sent.submit(lambda: made.append("never"))
    sent.close(lambda: made.append("last"), LONG_SECONDS, LONG_SECONDS)
    assert made == []
    assert not sent.connected
    assert sent.num_undelivered == 2


def test_the_caller_waits_neither_for_a_hanging_service_nor_at_the_end() -> None:
    release = threading.Event()
    began = time.monotonic()
    sent = delivery_to(release.wait, [])
    for _ in range(delivery.MAX_WAITING_CALLS + 7):
        sent.submit(lambda: None)
    assert not sent.wait_for_first_answer(0.1)
    assert sent.num_undelivered == 7
    sent.close(lambda: None, LONG_SECONDS, timeout_away_seconds=0.1)
    seconds = time.monotonic() - began
    release.set()
    assert seconds < 5
    # The connection that hangs, the calls that waited, the last one and the seven that were too many.
    assert sent.num_undelivered == 1 + delivery.MAX_WAITING_CALLS + 1 + 7


def test_the_last_call_is_taken_however_many_wait() -> None:
    gate = threading.Event()
    made: list[str] = []
    sent = delivery_to(gate.wait, [])
    for _ in range(delivery.MAX_WAITING_CALLS):
        sent.submit(lambda: made.append("call"))
    threading.Timer(0.1, gate.set).start()
    sent.close(lambda: made.append("last"), LONG_SECONDS, LONG_SECONDS)
    assert made == ["call"] * delivery.MAX_WAITING_CALLS + ["last"]
    assert sent.num_undelivered == 0
