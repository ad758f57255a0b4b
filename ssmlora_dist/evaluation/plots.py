"""Pictures of an evaluation: accuracy by length and depth as heat maps, and by length as curves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmlora_dist.durable import replacing

# A legend of more curves than these would cover them.
LEGEND_INSIDE = 6
# After so many curves the colours begin again, with another style of line.
NUM_COLORS = 10
LINE_STYLES = ("-", "--", ":", "-.")

Cells = Mapping[tuple[int, float], float]
"""Mean score from 0 to 1 by length in tokens and depth from 0 (the beginning) to 1."""
Curve = Mapping[int, tuple[float, float, float]]
"""Mean, lower and upper bound by length in tokens."""


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
    size = (max(4.5, 1.6 + len(panels) * (0.7 * len(lengths) + 0.8)), 1.6 + 0.45 * len(depths))
    figure, canvas = new_figure(size)
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, cells) in zip(all_axes, panels.items(), strict=True):
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


def plot_by_length(curves: Mapping[str, Curve], title: str, path: Path, unit: str | None = None) -> None:
    """Draws a quantity over input length with its interval, a curve for each of `curves`, and writes a PNG.

    Args:
        curves: what is compared to its curve.
        title: of the whole.
        path: the file; its directory is made.
        unit: of the values, which are drawn from 0 up; None for scores from 0 to 1, shown in percent.
    """
    is_crowded = len(curves) > LEGEND_INSIDE
    figure, canvas = new_figure((10 if is_crowded else 7, 4))
    axes = figure.subplots()
    lengths = sorted({length for curve in curves.values() for length in curve})
    for index, (name, curve) in enumerate(curves.items()):
        known = sorted(curve)
        means, lows, highs = zip(*(curve[length] for length in known), strict=True)
        style = LINE_STYLES[index // NUM_COLORS % len(LINE_STYLES)]
        [line] = axes.plot(known, means, marker="o", markersize=4, label=name, linestyle=style)
        axes.fill_between(known, lows, highs, color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    if unit is None:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xlabel("input length (tokens)")
    axes.grid(alpha=0.3)
    if is_crowded:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    else:
        axes.legend(fontsize=8)
    write_figure(figure, canvas, title, path)


def new_figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """An empty figure of `size` in inches, and the canvas that writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def write_figure(figure: Any, canvas: Any, title: str, path: Path) -> None:
    """Writes a figure of `new_figure` as a PNG that depends on nothing but what is drawn."""
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        # Without the name and version of what drew it.
        canvas.print_png(beside, metadata={"Software": None})
