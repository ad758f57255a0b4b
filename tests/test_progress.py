from __future__ import annotations

import threading

import pytest

from ssmlora_dist.progress import QUIET_SECONDS, Progress, Work, counted, progress, shown_by

from .told import Told


def test_nothing_is_shown_to_nobody() -> None:
    with progress("working", 2) as shown:
        shown.update(1, "loss 0.5")
    assert type(shown) is Progress
    assert list(counted("abc", "counting")) == ["a", "b", "c"]


def test_work_is_shown_by_what_was_asked_for() -> None:
    told = Told()
    with shown_by(told):
        with progress("working", 4, unit="rows", initial=1) as shown:
            shown.update(3, "loss 0.5", "9 tokens/s")
        assert list(counted("ab", "counting", 2)) == ["a", "b"]
    with progress("later"):
        pass
    assert told.works == [
        Work("working", 4, "rows", 1, QUIET_SECONDS),
        Work("counting", 2),
    ]
    assert told.updates == [("working", 3, 4), ("counting", 1, 2), ("counting", 2, 2)]
    assert told.figures["working"] == ("loss 0.5", "9 tokens/s")
    assert told.ended == [("working", True), ("counting", True)]


def test_a_unit_is_done_when_the_next_is_asked_for() -> None:
    told = Told()
    with shown_by(told):
        items = counted("ab", "counting")
        assert (next(items), told.updates) == ("a", [])
        assert (next(items), told.updates) == ("b", [("counting", 1, None)])


def test_work_that_fails_or_is_left_ends_undone() -> None:
    told = Told()
    with shown_by(told):
        with pytest.raises(ZeroDivisionError), progress("failing"):
            1 / 0  # noqa: B018
        items = counted("ab", "counting")
        next(items)
        items.close()
    assert told.ended == [("failing", False), ("counting", False)]


def test_other_threads_show_nothing() -> None:
    told = Told()

    def work() -> None:
        with progress("in the background"):
            pass

    with shown_by(told):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert told.works == []
