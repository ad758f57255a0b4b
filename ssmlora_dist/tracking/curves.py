"""A picture of a run: loss, learning rate, gradient norm and evaluation over the steps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmlora_dist.durable import replacing

# A panel's title and the keys of metrics rows that it shows; a key that few rows have is drawn with points.
PANELS = (
    ("loss", ("loss", "validation_loss")),
    ("exact match", ("validation_exact_match",)),
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("grad_norm",)),
)


def plot_curves(
    metrics_rows: Sequence[Mapping[str, Any]],
    path: Path,
    panels: Sequence[tuple[str, Sequence[str]]] = PANELS,
) -> bool:
    """Draws the metrics over `step`, a panel for each quantity, and writes a PNG.

    Args:
        metrics_rows: rows of metrics.jsonl; those without a `step`, and values that are null, are left out.
        path: the file; its directory is made.
        panels: titles and keys.

    Returns:
        False when nothing was drawn: no row has any of the keys, or matplotlib is not installed.
    """
    curves = [(title, {key: _points(metrics_rows, key) for key in keys}) for title, keys in panels]
    curves = [(title, {key: points for key, points in lines.items() if points}) for title, lines in curves]
    curves = [(title, lines) for title, lines in curves if lines]
    if not curves or importlib.util.find_spec("matplotlib") is None:
        return False

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4 * len(curves)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(all_axes, curves, strict=True):
        longest = max(len(points) for points in lines.values())
        for key, points in lines.items():
            steps, values = zip(*points, strict=True)
            sparse = len(points) < longest or len(points) <= 20
            axes.plot(steps, values, marker="o" if sparse else None, markersize=3, linewidth=1.2, label=key)
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    all_axes[-1].set_xlabel("step")

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        canvas.print_png(beside)
    return True


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a finite value; of two rows of one step the later one counts."""
    points = {
        row["step"]: row[key]
        for row in rows
        if row.get("step") is not None and isinstance(row.get(key), int | float) and math.isfinite(row[key])
    }
    return sorted(points.items())
