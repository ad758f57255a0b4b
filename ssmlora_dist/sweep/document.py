"""What a report consists of, apart from how it is written down: sections of tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: what is read; empty where there is nothing.
        value: what it is sorted by; the text if None.
        detail: a second line, such as an interval.
        is_bad: whether it tells of something that went wrong.
    """

    text: str
    value: float | None = None
    detail: str = ""
    is_bad: bool = False


NOTHING = Cell("")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        columns: their names; the first one names the row.
        rows: as many cells as columns in each.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
        path: of the PNG.
        caption: what it shows; the numbers are in the tables beside it.
    """

    path: Path
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: its heading.
        tables, plots: what stands in it.
    """

    title: str
    tables: Sequence[Table]
    plots: Sequence[Plot] = ()


@dataclass(frozen=True)
class Report:
    """What is written down as Markdown and as a page.

    Attributes:
        title: of the whole.
        notes: sentences on what was read, and how it is to be read.
        sections: those that have something to show.
    """

    title: str
    notes: Sequence[str]
    sections: Sequence[Section]
