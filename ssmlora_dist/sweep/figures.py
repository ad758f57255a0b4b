"""The plots of a report, as PNG files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmlora_dist.evaluation.plots import (
    COLORS,
    MARKERS,
    add_legend,
    drawable,
    new_figure,
    panel_inches,
    plot_by_length,
    plot_heat_maps,
    show_percent,
    write_figure,
)
from ssmlora_dist.sweep.aggregate import (
    LengthRow,
    by_depth,
    by_input_length,
    by_training_length,
    efficiencies,
    label_of,
)
from ssmlora_dist.sweep.cases import Measured, Sweep
from ssmlora_dist.sweep.document import Plot
from ssmlora_dist.sweep.rows import is_share

SPEED_UNITS = {"tokens_per_second": "tokens/s", "peak_memory_gib": "GiB"}
# More heat maps side by side than these, or wider ones, cannot be read.
PANELS = 4
PANELS_INCHES = 12
# A file system takes no name of more than 255 bytes.
LONGEST_STEM = 120
# Points of the page by which intervals over the same number of parameters stand apart.
APART = 6


class Plots:
    """Draws the plots of a sweep into a directory, each under a name of its own.

    Args:
        sweep: what is drawn.
        directory: for the files.
    """

    def __init__(self, sweep: Sweep, directory: Path) -> None:
        self._sweep = sweep
        self._directory = directory
        self._names: set[str] = set()

    def scores_by_length(self) -> list[Plot]:
        """Curves of losses and scores by input length, of scores without such parts by training length."""
        sweep, plots = self._sweep, []
        for name in sweep.measured_by_length:
            unit = None if is_share(name) else "loss" if "loss" in name else "value"
            plots += self._curves(name, "input length", by_input_length(sweep, name), unit)
        for name in sweep.scores:
            if name not in sweep.measured_by_length:
                plots += self._curves(name, "training length", by_training_length(sweep, name), None)
        return plots

    def speed_by_length(self) -> list[Plot]:
        """A curve for each method, of tokens per second and of peak memory by training length."""
        plots = []
        for metric, unit in SPEED_UNITS.items():
            rows = by_training_length(self._sweep, metric)
            plots += self._curves(metric, "training length", rows, unit, from_zero=True)
        return plots

    def heat_maps(self) -> list[Plot]:
        """A map for each method, of every task by input length and depth of the fact."""
        plots = []
        for name in self._sweep.measured_by_length:
            rows = [row for row in by_depth(self._sweep, name) if row.cells and is_share(name)]
            width = panel_inches(len({length for row in rows for length, _ in row.cells}))
            at_once = max(1, min(PANELS, int(PANELS_INCHES / width)))
            for start in range(0, len(rows), at_once):
                panels = {
                    self._label(row): {cell: found.mean for cell, found in row.cells.items()}
                    for row in rows[start : start + at_once]
                }
                path = self._path(f"{name}_heat_map")
                plot_heat_maps(panels, f"{name}, in percent", path)
                caption = f"{name} by input length and depth of the fact, in percent: {'; '.join(panels)}"
                plots.append(Plot(path, caption))
        return plots

    def scores_by_parameters(self) -> list[Plot]:
        """Every score over the number of trainable parameters, a colour for each group."""
        plots = []
        for metric in self._sweep.scores:
            marks: dict[str, list[tuple[Measured, Measured]]] = {}
            for case in self._sweep.cases:
                parameters, score = case.measure("num_trainable_parameters"), case.measure(metric)
                if parameters is not None and score is not None:
                    marks.setdefault(case.group, []).append((parameters, score))
            if marks:
                path = self._path(f"{metric}_by_parameters")
                title = f"{metric} by trainable parameters"
                _plot_by_parameters(marks, title, path)
                caption = (
                    f"{title}, a mark for every setting of a group; those of one number stand side by side"
                )
                plots.append(Plot(path, caption))
        return plots

    def efficiency(self) -> list[Plot]:
        """A bar for each workload and topology."""
        bars = [
            (f"{found.workload}: {found.topology}", found.relative)
            for found in efficiencies(self._sweep)
            if found.relative is not None
        ]
        if not bars:
            return []
        path = self._path("efficiency")
        caption = "Tokens per second and device, relative to the smallest topology"
        _plot_bars(bars, caption, path)
        return [Plot(path, caption)]

    def _curves(
        self,
        metric: str,
        length_name: str,
        rows: Sequence[LengthRow[Any]],
        unit: str | None,
        *,
        from_zero: bool = False,
    ) -> list[Plot]:
        curves = {}
        for row in rows:
            known = {length: found for length, found in row.cells.items() if length is not None}
            if known:
                curves[self._label(row)] = {
                    length: (found.mean, *_bounds(found)) for length, found in known.items()
                }
        if not curves:
            return []
        path, title = self._path(f"{metric}_by_length"), f"{metric} by {length_name}"
        plot_by_length(curves, title, path, unit, from_zero=from_zero, length_name=length_name)
        return [Plot(path, title)]

    def _label(self, row: LengthRow[Any]) -> str:
        return label_of(row.group, self._sweep.shown_setting(row.setting))

    def _path(self, name: str) -> Path:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", name.removeprefix("task/"))[-LONGEST_STEM:]
        number, unique = 1, stem
        while unique in self._names:
            number += 1
            unique = f"{stem}_{number}"
        self._names.add(unique)
        return self._directory / f"{unique}.png"


def _plot_by_parameters(
    marks: Mapping[str, Sequence[tuple[Measured, Measured]]], title: str, path: Path
) -> None:
    from matplotlib.transforms import offset_copy

    figure, canvas = new_figure((7, 4))
    axes = figure.subplots()
    numbers = Counter(parameters.mean for found in marks.values() for parameters, _ in found)
    drawn: Counter[float] = Counter()
    for index, (group, found) in enumerate(marks.items()):
        label: str | None = drawable(group)
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        for parameters, score in found:
            x = parameters.mean
            aside = APART * (drawn[x] - (numbers[x] - 1) / 2)
            drawn[x] += 1
            transform = offset_copy(axes.transData, figure, x=aside, units="points")
            style = {"fmt": marker, "color": color, "markersize": 5, "capsize": 2, "transform": transform}
            axes.errorbar([x], [score.mean], _errors([score]), label=label, **style)
            label = None
    axes.set_ylim(-0.02, 1.02)
    show_percent(axes.yaxis)
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel("trainable parameters")
    low, high = min(numbers), max(numbers)
    margin = 0.1 * (high - low or high or 1)
    axes.set_xlim(low - margin, high + margin)
    axes.grid(alpha=0.3)
    add_legend(figure, axes)
    write_figure(figure, canvas, title, path)


def _plot_bars(bars: Sequence[tuple[str, Measured]], title: str, path: Path) -> None:
    figure, canvas = new_figure((8, 1.4 + 0.35 * len(bars)))
    axes = figure.subplots()
    means = [found.mean for _, found in bars]
    errors = _errors([found for _, found in bars])
    axes.barh(range(len(bars)), means, xerr=errors, height=0.6, capsize=3, color=COLORS[0])
    axes.set_yticks(range(len(bars)), [drawable(label) for label, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    show_percent(axes.xaxis)
    axes.set_xlabel("of the smallest topology's")
    write_figure(figure, canvas, title, path)


def _bounds(found: Measured) -> tuple[float, float]:
    """The interval, or of one seed, which has none, the value itself."""
    return (found.lower, found.upper) if found.count > 1 else (found.mean, found.mean)


def _errors(measured: Sequence[Measured]) -> list[list[float]]:
    """How far the intervals reach below and above the means."""
    below = [max(0.0, found.mean - _bounds(found)[0]) for found in measured]
    above = [max(0.0, _bounds(found)[1] - found.mean) for found in measured]
    return [below, above]


def _short(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
