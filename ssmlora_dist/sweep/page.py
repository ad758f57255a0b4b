"""A report as one HTML page that needs nothing else: its plots, style and script are in it."""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Sequence

from ssmlora_dist.sweep.document import Cell, Plot, Report, Section, Table

# Whatever a page holds, a browser fetches nothing for it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b6570; --back: #fff; --stripe: #f5f7f9;
  --line: #d5dbe1; --bad: #a3190f; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e8ec; --soft: #a3adb8; --back: #15181c; --stripe: #1d2126; --line: #3a424b;
    --bad: #ff8f85; --link: #86bdff; }
}
body { margin: 0 auto; max-width: 1320px; padding: 16px 24px 48px; color: var(--text);
  background: var(--back); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 24px; }
h2 { font-size: 19px; margin-top: 40px; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; }
a { color: var(--link); }
.scroll { overflow-x: auto; margin: 16px 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 4px 0; }
th, td { padding: 4px 6px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; white-space: nowrap; position: sticky; left: 0; background: var(--back); }
tbody tr:nth-child(even), tbody tr:nth-child(even) th { background: var(--stripe); }
.number, .number button { text-align: right; }
td.number { white-space: nowrap; }
tbody th.long { min-width: 160px; max-width: 280px; white-space: normal; overflow-wrap: anywhere; }
td.long { min-width: 170px; max-width: 420px; overflow-wrap: anywhere; }
small { display: block; color: var(--soft); font-size: 11px; }
.bad { color: var(--bad); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 2px;
  text-align: left; cursor: pointer; }
thead button:hover { text-decoration: underline; }
thead button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--link); }
thead button::after { content: "\\00a0\\2195"; color: var(--soft); }
th[aria-sort="ascending"] button::after { content: "\\00a0\\2191"; color: var(--text); }
th[aria-sort="descending"] button::after { content: "\\00a0\\2193"; color: var(--text); }
.plots { display: flex; flex-wrap: wrap; gap: 16px; }
figure { margin: 0; flex: 1 1 480px; max-width: 640px; }
figure.wide { flex-basis: 100%; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: 13px; padding-top: 4px; }
"""

# Numbers come before texts; what is empty stays last, whichever way the rest is sorted.
SCRIPT = """
"use strict";
const texts = new Intl.Collator("en", { numeric: true });
function rankOf(cell) {
  if (cell.dataset.value !== undefined) return [0, Number(cell.dataset.value)];
  return cell.textContent === "" ? [2, ""] : [1, cell.textContent];
}
function compare(one, other, sign) {
  if (one[0] === 2 || other[0] === 2) return one[0] - other[0];
  if (one[0] !== other[0]) return sign * (one[0] - other[0]);
  return sign * (one[0] === 1 ? texts.compare(one[1], other[1]) : one[1] - other[1] || 0);
}
for (const table of document.querySelectorAll("table")) {
  const heads = Array.from(table.tHead.rows[0].cells);
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
    const rows = Array.from(table.tBodies[0].rows, row => [rankOf(row.cells[column]), row]);
    rows.sort((one, other) => compare(one[0], other[0], sign));
    table.tBodies[0].append(...rows.map(entry => entry[1]));
  }));
}
"""

# A plot of more pixels has a row to itself.
WIDE_PLOT = 720
# From here on a text gets a column of some width, in which it is broken.
LONG_TEXT = 24
LONG_NAME = 40


def page_text(report: Report) -> str:
    """The page."""
    title = html.escape(report.title)
    links = "".join(
        f'<li><a href="#section-{number}">{html.escape(section.title)}</a></li>\n'
        for number, section in enumerate(report.sections, start=1)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in report.notes)
    sections = "".join(
        _section(section, f"section-{number}") for number, section in enumerate(report.sections, start=1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{title}</h1>\n<ul>\n{notes}</ul>\n</header>\n"
        f'<nav aria-label="Sections">\n<ul>\n{links}</ul>\n</nav>\n'
        f"<main>\n{sections}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, anchor: str) -> str:
    plots = "".join(map(_figure, section.plots))
    shown = f'<div class="plots">\n{plots}</div>\n' if plots else ""
    tables = "".join(map(_table, section.tables))
    return f'<section id="{anchor}">\n<h2>{html.escape(section.title)}</h2>\n{shown}{tables}</section>\n'


def _figure(plot: Plot) -> str:
    png = plot.path.read_bytes()
    content = base64.b64encode(png).decode()
    width, height = struct.unpack(">II", png[16:24])
    marks = ' class="wide"' if width > WIDE_PLOT else ""
    caption = html.escape(plot.caption)
    return (
        f'<figure{marks}><img width="{width}" height="{height}" alt="{caption}" '
        f'src="data:image/png;base64,{content}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _table(table: Table) -> str:
    caption = html.escape(table.caption)
    heads = "".join(_head(table, column) for column in range(len(table.columns)))
    rows = "".join(_row(row) for row in table.rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n'
        f"<table>\n<caption>{caption}</caption>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n"
        "</table>\n</div>\n"
    )


def _head(table: Table, column: int) -> str:
    filled = [row[column] for row in table.rows if row[column].text]
    numeric = bool(filled) and all(cell.value is not None for cell in filled)
    marks = ' class="number"' if numeric else ""
    name = _breakable(table.columns[column])
    return f'<th scope="col"{marks}><button type="button">{name}</button></th>'


def _row(cells: Sequence[Cell]) -> str:
    first, *rest = cells
    marks = ' class="long"' if len(first.text) > LONG_NAME else ""
    return f'<tr><th scope="row"{marks}>{html.escape(first.text)}</th>{"".join(map(_cell, rest))}</tr>\n'


def _cell(cell: Cell) -> str:
    classes = ["number"] * (cell.value is not None) + ["bad"] * cell.is_bad
    if len(cell.text) > LONG_TEXT:
        classes.append("long")
    marks = f' class="{" ".join(classes)}"' if classes else ""
    if cell.value is not None:
        marks += f' data-value="{cell.value!r}"'
    detail = f"<small>{html.escape(cell.detail)}</small>" if cell.detail else ""
    return f"<td{marks}>{html.escape(cell.text)}{detail}</td>"


def _breakable(name: str) -> str:
    """A name that may be broken after the marks in it."""
    return re.sub(r"([_/.])", r"\1<wbr>", html.escape(name))
