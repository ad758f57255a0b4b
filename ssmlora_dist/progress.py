"""How far long work is: whoever does it says so here, and a console shows it where somebody looks.

Any package may say so. Nothing is shown unless whoever runs the process has asked for it (`shown_by`), and
what other threads than that one's do is never shown: they work beside what is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

# Work that is done before then is not worth a word.
QUIET_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """A piece of work that may take long.

    Attributes:
        description: what is going on, such as `reading rows.jsonl`.
        total: how many units of work there are; None: not known.
        unit: what they are called, in the plural; shown where there is no total.
        initial: how many of them were done before.
        quiet_seconds: for which nothing is shown, and between two lines of a log.
    """

    description: str
    total: int | None = None
    unit: str = ""
    initial: int = 0
    quiet_seconds: float = QUIET_SECONDS


class Progress:
    """How far a piece of work is; this one shows it to nobody."""

    def update(self, done: int, *figures: str) -> None:
        """Says that `done` units are done, with figures of the latest."""

    def close(self, *, is_done: bool) -> None:
        """Says that the work has ended, or was given up."""


Show = Callable[[Work], Progress]

_show: ContextVar[Show] = ContextVar("show", default=lambda work: Progress())


@contextmanager
def shown_by(show: Show) -> Iterator[None]:
    """Has what this thread does in the meantime shown by what `show` makes of each piece of work."""
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)


@contextmanager
def progress(
    description: str,
    total: int | None = None,
    *,
    unit: str = "",
    initial: int = 0,
    quiet_seconds: float = QUIET_SECONDS,
) -> Iterator[Progress]:
    """A piece of work, which is done in the body; see `Work`."""
    shown = _show.get()(Work(description, total, unit, initial, quiet_seconds))
    is_done = False
    try:
        yield shown
        is_done = True
    finally:
        shown.close(is_done=is_done)


def counted(items: Iterable[T], description: str, total: int | None = None, *, unit: str = "") -> Iterator[T]:
    """Gives `items` on; each is a unit of work, done when the next one is asked for."""
    with progress(description, total, unit=unit) as shown:
        for done, item in enumerate(items, start=1):
            yield item
            shown.update(done)
