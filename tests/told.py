"""What work tells of its progress, kept instead of shown."""

from __future__ import annotations

from collections.abc import Callable

from ssmlora_dist.progress import Progress, Work


class Told:
    """To be given to `progress.shown_by`.

    Args:
        on_update: called with the work and how much of it is done.

    Attributes:
        works: those begun, in order.
        updates: description of a work, how much of it is done and its total, in order.
        figures: of the latest update of each work, by description.
        ended: descriptions of works that have ended, and whether they were done.
    """

    def __init__(self, on_update: Callable[[Work, int], object] = lambda work, done: None) -> None:
        self.works: list[Work] = []
        self.updates: list[tuple[str, int, int | None]] = []
        self.figures: dict[str, tuple[str, ...]] = {}
        self.ended: list[tuple[str, bool]] = []
        self._on_update = on_update

    def __call__(self, work: Work) -> Progress:
        self.works.append(work)
        return _Told(self, work)

    def _update(self, work: Work, done: int, figures: tuple[str, ...]) -> None:
        self.updates.append((work.description, done, work.total))
        self.figures[work.description] = figures
        self._on_update(work, done)


class _Told(Progress):
    def __init__(self, told: Told, work: Work) -> None:
        self._told, self._work = told, work

    def update(self, done: int, *figures: str) -> None:
        self._told._update(self._work, done, figures)

    def close(self, *, is_done: bool) -> None:
        self._told.ended.append((self._work.description, is_done))
