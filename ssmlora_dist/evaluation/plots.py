"""Pictures of an evaluation: accuracy by length and depth as heat maps, and by length as curves."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmlora_dist.durable import replacing

# Okabe's and Ito's, which the colour-blind tell apart, without their yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Another one whenever the colours begin again; the markers' number shares no factor with that of the colours.
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v")
# Characters that there is room for: on a line of a title or a legend, and of what stands in them.
TITLE_LINE = 80
LEGEND_LINE = 100
LONGEST_TITLE = 3 * TITLE_LINE
LONGEST_LABEL = 60
# Inches that a line of small text takes, and characters of it that an inch takes.
LINE_INCHES = 0.19
CHARACTERS_PER_INCH = 11
# More lengths than these are named at an angle; more than those do not fit on an axis.
CROWDED = 6
MOST_NAMED = 16
# A line of nearly equal values, drawn from zero, would lie on the frame.
HEADROOM = 1.1

Cells = Mapping[tuple[int, float], float]
"""Mean score from 0 to 1 by length in tokens and depth from 0 (the beginning) to 1."""
Curve = Mapping[int, tuple[float, float, float]]
"""Mean, lower and upper bound by length in tokens."""


def panel_inches(num_lengths: int) -> float:
    """How wide a heat map of so many lengths is drawn."""
    return 0.7 * num_lengths + 0.8


def plot_heat_maps(panels: Mapping[str, Cells], title: str, path: Path) -> None:
    """Draws a heat map beside the other for each of `panels`, and writes a PNG.

    Args:
        panels: what is compared, such as the base model and the adapted one, to its cells; cells that are
            missing stay empty.
        title: of the whole.
        path: the file; its directory is made.
    """
    lengths = sorted({length for cells in panels.values() for length, _ in cells})
    depths = sorted({depth for cells in panels.values() for _, depth in cells})
    width = panel_inches(len(lengths))
    names = [_wrapped(name, int(CHARACTERS_PER_INCH * width), 2 * LONGEST_LABEL) for name in panels]
    height = 1.6 + 0.45 * len(depths) + LINE_INCHES * max(name.count("\n") for name in names)
    figure, canvas = new_figure((max(4.5, 1.6 + len(panels) * width), height))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, name, cells in zip(all_axes, names, panels.values(), strict=True):
        grid = [[cells.get((length, depth), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:
                    color = "white" if value < 0.6 else "black"
                    text = f"{100 * value:.0f}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("input length (tokens)")
    all_axes[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=list(all_axes), format=lambda value, _: f"{value:.0%}")
    write_figure(figure, canvas, title, path)


def plot_by_length(
    curves: Mapping[str, Curve],
    title: str,
    path: Path,
    unit: str | None = None,
    *,
    from_zero: bool = True,
    length_name: str = "input length",
) -> None:
    """Draws a quantity over length with its interval, a curve for each of `curves`, and writes a PNG.

    Args:
        curves: what is compared to its curve.
        title: of the whole.
        path: the file; its directory is made.
        unit: of the values; None for scores from 0 to 1, shown in percent.
        from_zero: whether the axis of values that have a unit begins at 0.
        length_name: what the lengths are of.
    """
    figure, canvas = new_figure((7, 4))
    axes = figure.subplots()
    for index, (name, curve) in enumerate(curves.items()):
        known = sorted(curve)
        means, lows, highs = zip(*(curve[length] for length in known), strict=True)
        color = COLORS[index % len(COLORS)]
        style = {"linestyle": LINE_STYLES[index // len(COLORS) % len(LINE_STYLES)], "markersize": 4}
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(known, means, marker=marker, color=color, label=drawable(name), **style)
        if len(known) > 1:
            axes.fill_between(known, lows, highs, color=color, alpha=0.15)
        else:
            axes.vlines(known, lows, highs, color=color, alpha=0.5)
    lengths = sorted({length for curve in curves.values() for length in curve})
    axes.set_xscale("log", base=2)
    named = _apart(lengths)
    turned = {"rotation": 45, "fontsize": 8} if len(named) > CROWDED else {}
    axes.set_xticks(named, [f"{length:,}" for length in named], **turned)
    axes.minorticks_off()
    if unit is None:
        show_percent(axes.yaxis)
        axes.set_ylim(-0.02, 1.02)
    else:
        if from_zero:
            drawn = [mean for curve in curves.values() for mean, _, _ in curve.values()]
            axes.set_ylim(min(0, *drawn), max(axes.get_ylim()[1], HEADROOM * max(drawn)))
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel(f"{length_name} (tokens)")
    axes.grid(alpha=0.3)
    add_legend(figure, axes)
    write_figure(figure, canvas, title, path)


def new_figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure of `size` in inches, and the canvas that writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def add_legend(figure: Any, axes: Any) -> None:
    """Puts the legend below the axes and makes the figure as much higher: however long, it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, min(len(labels), LEGEND_LINE // (max(map(len, labels)) + 6)))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.1 + LINE_INCHES * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def show_percent(axis: Any) -> None:
    """Writes the shares along an axis in percent."""
    axis.set_major_formatter(lambda value, _: f"{value:.0%}")


def drawable(text: str, longest: int = LONGEST_LABEL) -> str:
    """A text as it is to be given to matplotlib, its middle left out where it is too long.

    A dollar would begin a formula, and a leading underscore hide a label from the legend.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]}\N{HORIZONTAL ELLIPSIS}{text[1 - longest // 2 :]}"
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def write_figure(figure: Any, canvas: Any, title: str, path: Path) -> None:
    """Writes a figure of `new_figure` as a PNG that depends on nothing but what is drawn."""
    figure.suptitle(_wrapped(title, TITLE_LINE, LONGEST_TITLE), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        # Without the name and version of what drew it.
        canvas.print_png(beside, metadata={"Software": None})


def _apart(lengths: Sequence[int]) -> list[int]:
    """Those of the ascending lengths that have room for their numbers along a logarithmic axis."""
    least = (lengths[-1] / lengths[0]) ** (1 / MOST_NAMED)
    kept = [lengths[0]]
    for length in lengths[1:]:
        if length >= kept[-1] * least:
            kept.append(length)
    return kept


def _wrapped(text: str, width: int, longest: int) -> str:
    return textwrap.fill(drawable(text, longest), width)
