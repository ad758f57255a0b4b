"""The report of a sweep: from points.jsonl to plots, report.md and report.html, in one go and byte-stable."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from ssmlora_dist.durable import explained, write_text
from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import progress
from ssmlora_dist.records import nearest_name
from ssmlora_dist.sweep import report_tables as tables
from ssmlora_dist.sweep.cases import Sweep, ordered_sweep
from ssmlora_dist.sweep.document import Report, Section
from ssmlora_dist.sweep.figures import Plots
from ssmlora_dist.sweep.markdown import markdown_text
from ssmlora_dist.sweep.page import page_text
from ssmlora_dist.sweep.rows import OUTCOMES, printable, read_rows

POINTS_FILE = "points.jsonl"


def write_report(sweep: Path, out: Path | None = None, baseline: str | None = None) -> list[Path]:
    """Writes `report.html`, `report.md` and `plots/` and says what was written, in that order.

    The same rows give the same bytes, in whatever order they stand; plots of an earlier report that the new
    one does not have are removed.

    Args:
        sweep: a sweep directory, or a file of rows as its points.jsonl.
        out: where to; `report` in the sweep directory, or beside the file, if None.
        baseline: the group that the others are compared with; that of `sweep.json` if None.

    Raises:
        DataError: there are no rows to read, `sweep.json` is broken, or no point is of the baseline given.
        CheckpointError: the report cannot be written.
    """
    read = read_sweep(sweep, baseline)
    directory = out if out is not None else (sweep if sweep.is_dir() else sweep.parent) / "report"
    with explained(directory, "choose another --out"):
        directory.mkdir(parents=True, exist_ok=True)
        with progress("drawing the report"):
            report = build_report(read, directory / "plots")
        page, text = directory / "report.html", directory / "report.md"
        outdated = _plots_in(text)
        write_text(page, page_text(report))
        write_text(text, markdown_text(report, directory))
        for plot in outdated - _plots_in(text):
            plot.unlink(missing_ok=True)
    return [page, text, *(plot.path for section in report.sections for plot in section.plots)]


def read_sweep(path: Path, baseline: str | None = None) -> Sweep:
    """The rows of a sweep directory or of a file, and name and baseline from `sweep.json` if there is one.

    Raises:
        DataError: as `write_report` does.
    """
    is_directory = path.is_dir()
    rows = path / POINTS_FILE if is_directory else path
    points, broken = read_rows(rows)
    if not points and not broken:
        raise DataError(f"{rows}: holds no rows; run the sweep, or name a file with a row for each point")
    name, planned_baseline = (path.resolve().name if is_directory else path.stem), None
    if is_directory and (path / "sweep.json").exists():
        name, planned_baseline = _planned(path / "sweep.json", name)
    groups = sorted({point.group for point in points})
    if baseline is not None and baseline not in groups:
        raise DataError(
            f"--baseline {baseline}: no point is of this group{nearest_name(baseline, groups)}; "
            f"there are: {', '.join(groups) or 'none'}"
        )
    return ordered_sweep(printable(name), points, broken, baseline or planned_baseline)


def build_report(sweep: Sweep, plots_directory: Path) -> Report:
    """Draws the plots of a sweep and puts the sections together."""
    plots = Plots(sweep, plots_directory)
    sections = [
        Section("Not counted", [tables.not_counted_table(sweep)]),
        Section("Losses and scores", [tables.means_table(sweep)]),
        Section("Speed and memory", [tables.speed_table(sweep)]),
    ]
    if sweep.baseline is not None:
        sections.append(Section("Differences to the baseline", tables.differences_tables(sweep)))
    sections += [
        Section("Scores by length", tables.length_tables(sweep), plots.scores_by_length()),
        Section("Scores by depth and length", tables.depth_tables(sweep), plots.heat_maps()),
        Section("Speed and memory by length", tables.speed_by_length_tables(sweep), plots.speed_by_length()),
        Section("Parameters and scores", [tables.parameters_table(sweep)], plots.scores_by_parameters()),
        Section("Efficiency by topology", [tables.efficiency_table(sweep)], plots.efficiency()),
        Section("All points", [tables.points_table(sweep)]),
    ]
    shown = [section for section in sections if any(table.rows for table in section.tables)]
    return Report(f"Sweep {sweep.name}", _notes(sweep), shown)


def _planned(path: Path, name: str) -> tuple[str, str | None]:
    """Name and baseline of a sweep file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        name, baseline = content.get("name", name), content.get("baseline")
        if not isinstance(name, str) or not isinstance(baseline, str | None):
            raise ValueError("its name or baseline is no text")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: no sweep file ({error}); mend it, or report on {POINTS_FILE} alone by naming that file"
        ) from None
    return name, printable(baseline or "") or None


def _plots_in(text: Path) -> set[Path]:
    """The plots that a report in Markdown shows, as far as there is one."""
    if not text.exists():
        return set()
    content = text.read_text(encoding="utf-8", errors="replace")
    return {text.parent / link for link in re.findall(r"\]\((plots/[A-Za-z0-9_-]+\.png)\)", content)}


def _notes(sweep: Sweep) -> list[str]:
    counts = Counter(point.outcome for point in sweep.points)
    told = [f"{counts[name]} {name.replace('_', ' ')}" for name in OUTCOMES if counts[name]]
    plural = "" if len(sweep.points) == 1 else "s"
    notes = [f"{len(sweep.points)} point{plural}" + (f": {', '.join(told)}." if told else ".")]
    if sweep.broken:
        notes.append(f"Broken rows, which are no points: {len(sweep.broken)}; what is wrong stands below.")
    notes.append(
        "A mean is over the seeds that finished; in brackets is its 95% interval, Student's, or where scores "
        "do not spread the widest that they can have. What is not counted is named."
    )
    repeats = sum(len(case.points) - len({point.seed for point in case.points}) for case in sweep.cases)
    if repeats:
        notes.append(
            f"Points that repeat group, setting and seed of another: {repeats}; those of a seed count once, "
            "with their mean."
        )
    if sweep.baseline is None:
        notes.append("No baseline is named, so there are no differences to one.")
    elif all(point.group != sweep.baseline for point in sweep.points):
        notes.append(f"No point is of the baseline, {sweep.baseline}.")
    return notes
