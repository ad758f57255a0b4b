"""A report as Markdown, its plots as links."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from ssmlora_dist.sweep.document import Cell, Report, Table


def markdown_text(report: Report, directory: Path) -> str:
    """The text of a report that lies in `directory`."""
    blocks = [f"# {_escaped(report.title)}", "\n".join(f"- {_escaped(note)}" for note in report.notes)]
    for section in report.sections:
        blocks.append(f"## {_escaped(section.title)}")
        for plot in section.plots:
            link = plot.path.relative_to(directory).as_posix()
            blocks.append(f"![{_escaped(plot.caption)}]({link})")
        blocks += [_table(table) for table in section.tables]
    return "\n\n".join(blocks) + "\n"


def _table(table: Table) -> str:
    lines = [_line([_escaped(name) for name in table.columns]), _line(["---"] * len(table.columns))]
    lines += [_line([_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join([f"**{_escaped(table.caption)}**", "", *lines])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return _escaped(" ".join(filter(None, (cell.text, cell.detail))))


def _escaped(text: str) -> str:
    """As it is read: what Markdown or HTML would take for its own is not."""
    return re.sub(r"([\\`*_|\[\]#~$])", r"\\\1", html.escape(text, quote=False))
