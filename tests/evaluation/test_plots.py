"""Pictures: axes, cells, curves and their labels, for whatever an evaluation has and lacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.evaluation import plots
from ssmlora_dist.evaluation.plots import plot_by_length, plot_heat_maps
from tests.figures import noted_figures

PNG = b"\x89PNG\r\n\x1a\n"
FULL = {(length, depth): depth for length in (256, 1024) for depth in (0.0, 0.5, 1.0)}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    with noted_figures(monkeypatch, plots) as made:
        yield made


def is_png(path: Path) -> bool:
    """Whether a whole PNG lies there, and nothing beside it."""
    content = path.read_bytes()
    alone = [entry.name for entry in path.parent.iterdir()] == [path.name]
    return content.startswith(PNG) and content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82") and alone


@pytest.mark.parametrize(
    ("panels", "lengths", "depths"),
    [
        ({"base": FULL, "adapter": FULL}, ["256", "1,024"], ["0%", "50%", "100%"]),
        ({"base": {(512, 0.25): 1.0}}, ["512"], ["25%"]),
        ({"base": {(512, d): 0.3 for d in (0.0, 1.0)}}, ["512"], ["0%", "100%"]),
        ({"base": {(n, 0.5): 0.3 for n in (128, 256, 4096)}}, ["128", "256", "4,096"], ["50%"]),
        # Cells that the other panel has, and one that neither has.
        ({"base": {(512, 0.0): 0.1}, "adapter": {(1024, 1.0): 0.9}}, ["512", "1,024"], ["0%", "100%"]),
    ],
)
def test_heat_maps(
    panels: Mapping[str, plots.Cells],
    lengths: list[str],
    depths: list[str],
    figures: list[Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / "plots" / "map.png"
    plot_heat_maps(panels, "keys", path)
    assert is_png(path)
    [figure] = figures
    *maps, colours = figure.axes
    assert [axes.get_title() for axes in maps] == list(panels)
    assert figure.get_suptitle() == "keys"
    assert [label.get_text() for label in maps[0].get_xticklabels()] == lengths
    assert [label.get_text() for label in maps[0].get_yticklabels()] == depths
    for axes, cells in zip(maps, panels.values(), strict=True):
        [image] = axes.images
        assert image.get_clim() == (0, 1), "colours mean the same in every panel"
        assert sorted(text.get_text() for text in axes.texts) == sorted(
            f"{100 * v:.0f}" for v in cells.values()
        )
        grid = image.get_array()
        known_lengths, known_depths = (
            sorted({cell[i] for p in panels.values() for cell in p}) for i in (0, 1)
        )
        assert grid.shape == (len(known_depths), len(known_lengths))
        for (length, depth), value in cells.items():
            assert grid[known_depths.index(depth), known_lengths.index(length)] == value
        assert grid.count() == len(cells), "what is missing stays empty"
    assert colours.get_ylim() == (0, 1)


@pytest.mark.parametrize(
    "curves",
    [
        {"base": {256: (0.5, 0.2, 0.8), 1024: (0.4, 0.1, 0.7)}, "adapter": {1024: (0.9, 0.7, 1.0)}},
        {"base": {512: (0.0, 0.0, 0.3)}},
    ],
)
def test_curves(curves: Mapping[str, plots.Curve], figures: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "plots" / "curves.png"
    plot_by_length(curves, "keys", path)
    assert is_png(path)
    [figure] = figures
    [axes] = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(curves)
    lengths = sorted({length for curve in curves.values() for length in curve})
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{length:,}" for length in lengths]
    for line, curve in zip(axes.lines, curves.values(), strict=True):
        assert list(line.get_xdata()) == sorted(curve)
        assert list(line.get_ydata()) == [curve[length][0] for length in sorted(curve)]
    assert len(axes.collections) == len(curves), "each with its interval"
    low, high = axes.get_ylim()
    assert low < 0 < 1 < high
    first, last = axes.get_xlim()
    assert first <= lengths[0] <= lengths[-1] <= last


def test_curves_of_another_quantity(figures: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "plots" / "speed.png"
    plot_by_length({"lora": {512: (20000.0, 19000.0, 21000.0)}}, "speed", path, unit="tokens/s")
    [axes] = figures[0].axes
    assert axes.get_ylabel() == "tokens/s"
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 21000
    assert axes.yaxis.get_major_formatter()(20000.0, 0) == "20,000"


def test_nearly_equal_values_drawn_from_zero_do_not_lie_on_the_frame(
    figures: list[Any], tmp_path: Path
) -> None:
    curve = {512: (0.7299, 0.7295, 0.7303), 1024: (0.7304, 0.7300, 0.7308)}
    plot_by_length({"lora": curve}, "memory", tmp_path / "memory.png", unit="GiB", from_zero=True)
    low, high = figures[0].axes[0].get_ylim()
    assert low == 0
    assert high > 0.78


def test_many_curves_look_different_and_their_legend_covers_none(figures: list[Any], tmp_path: Path) -> None:
    curves = {f"method {index}": {512: (0.5, 0.4, 0.6)} for index in range(28)}
    plot_by_length(curves, "keys", tmp_path / "plots" / "curves.png")
    [axes] = figures[0].axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 28
    figures[0].draw_without_rendering()
    [legend] = figures[0].legends
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0
    assert axes.get_window_extent().height > 200, "the figure grows with its legend"


def test_one_length_shows_its_interval(figures: list[Any], tmp_path: Path) -> None:
    plot_by_length({"base": {512: (0.5, 0.25, 0.75)}}, "keys", tmp_path / "curves.png")
    [interval] = figures[0].axes[0].collections
    assert interval.get_segments()[0].tolist() == [[512, 0.25], [512, 0.75]]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b", "a_b"),
        ("_a", " _a"),
        ("$x^{$", r"\$x^{\$"),
        ("a" * 50 + "b" * 50, "a" * 30 + "\u2026" + "b" * 29),
    ],
)
def test_texts_are_shown_as_they_are(text: str, shown: str) -> None:
    assert plots.drawable(text) == shown


def test_a_picture_names_no_software(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    plot_heat_maps({"base": FULL}, "keys", path)
    assert b"Software" not in path.read_bytes()


def test_a_picture_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.png"
    plot_heat_maps({"base": FULL}, "keys", path)
    before = path.read_bytes()

    def write_half(_: Any, file: Path, **__: Any) -> None:
        file.write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", write_half)
    with pytest.raises(OSError, match="no space left"):
        plot_heat_maps({"base": {(512, 0.5): 1.0}}, "keys", path)
    assert path.read_bytes() == before
    assert is_png(path)


def test_many_lengths_are_named_as_far_as_there_is_room(figures: list[Any], tmp_path: Path) -> None:
    plot_by_length({"base": {64 * n: (0.5, 0.4, 0.6) for n in range(1, 31)}}, "keys", tmp_path / "curves.png")
    [axes] = figures[0].axes
    figures[0].draw_without_rendering()
    labels = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert 10 <= len(labels) <= 17
    # Turned by 45 degrees, numbers may overlap sideways, not where they begin.
    assert min(b.x1 - a.x1 for a, b in itertools.pairwise(labels)) > 8
