"""Which plots there are, and what is drawn in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.evaluation import plots as evaluation_plots
from ssmlora_dist.sweep import figures
from ssmlora_dist.sweep.figures import Plots
from tests.figures import noted_figures
from tests.sweep.results import full_sweep, lost, result, sweep_of


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    with noted_figures(monkeypatch, evaluation_plots, figures) as made:
        yield made


def names(made: list[figures.Plot]) -> list[str]:
    assert all(plot.path.read_bytes().startswith(b"\x89PNG") for plot in made)
    return [plot.path.name for plot in made]


def test_all_plots_of_a_sweep(drawn: list[Any], tmp_path: Path) -> None:
    plots = Plots(sweep_of(*full_sweep(), baseline="lora"), tmp_path)
    assert names(plots.scores_by_length()) == [
        "keys_by_length.png",
        "validation_exact_match_after_by_length.png",
    ]
    assert names(plots.heat_maps()) == ["keys_heat_map.png"]
    assert names(plots.speed_by_length()) == [
        "tokens_per_second_by_length.png",
        "peak_memory_gib_by_length.png",
    ]
    assert names(plots.scores_by_parameters()) == [
        "validation_exact_match_after_by_parameters.png",
        "keys_by_parameters.png",
    ]
    assert names(plots.efficiency()) == ["efficiency.png"]
    labels = ["lora, ranks=1", "lora, ranks=2", "ssmlora, ranks=1", "ssmlora, ranks=2"]
    [legend] = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == labels
    assert [list(line.get_xdata()) for line in drawn[0].axes[0].lines] == [[256], *[[256, 1024]] * 3]
    assert [axes.get_title() for axes in drawn[2].axes[:-1]] == labels
    speed = drawn[3].axes[0]
    assert (speed.get_xlabel(), speed.get_ylabel()) == ("training length (tokens)", "tokens/s")
    assert speed.get_ylim()[0] == 0
    assert list(speed.lines[1].get_ydata()) == [1670.0, 1286.0]
    parameters = drawn[5].axes[0]
    assert sorted({x for one in parameters.containers for x in one.lines[0].get_xdata()}) == [1024.0, 2048.0]
    left, right = parameters.get_xlim()
    assert left < 1024 < 2048 < right
    bars = drawn[-1].axes[0].containers[-1]
    assert len(bars) == 7, "none for what did not finish"
    assert [bar.get_width() for bar in bars][2] == 1.0


def test_no_plots_of_what_was_not_measured(drawn: list[Any], tmp_path: Path) -> None:
    plots = Plots(sweep_of(lost("lora"), result("ssmlora", 0, {"final_loss": 2.0})), tmp_path)
    made = [plots.scores_by_length, plots.heat_maps, plots.speed_by_length, plots.scores_by_parameters]
    assert [draw() for draw in [*made, plots.efficiency]] == [[]] * 5
    assert drawn == []


def test_names_that_mean_something_to_the_library(drawn: list[Any], tmp_path: Path) -> None:
    points = [
        result(group, 0, {"task/a$b$/512": 0.5, "task/a_b_/512": 0.5})
        for group in ("_hidden", "$x^{$", "a_b")
    ]
    made = Plots(sweep_of(*points), tmp_path / "plots").scores_by_length()
    assert names(made) == ["a_b__by_length.png", "a_b__by_length_2.png"]
    assert len(drawn[0].legends[0].get_texts()) == 3


def test_a_curve_of_one_seed_has_no_band(drawn: list[Any], tmp_path: Path) -> None:
    points = [result("lora", 0, {"peak_memory_gib": 1.0}, {"data.max_length": n}) for n in (128, 256)]
    Plots(sweep_of(*points), tmp_path).speed_by_length()
    [band] = drawn[0].axes[0].collections
    assert {y for _, y in band.get_paths()[0].vertices} == {1.0}


def test_losses_are_not_drawn_from_zero(drawn: list[Any], tmp_path: Path) -> None:
    points = [result("lora", 0, {f"validation_loss_after/{n}": 6.0 + n / 1000 for n in (64, 128)})]
    Plots(sweep_of(*points), tmp_path).scores_by_length()
    axes = drawn[0].axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("input length (tokens)", "loss")
    assert axes.get_ylim()[0] > 5


def test_many_lengths_and_groups_of_long_names(drawn: list[Any], tmp_path: Path) -> None:
    lengths = [64 * n for n in range(1, 19)]
    points = [
        result(
            f"{name} {'x' * 300}",
            0,
            {
                "num_trainable_parameters": 100.0,
                f"task/{'k' * 300}": 0.5,
                **{f"task/{'k' * 300}/{n}/{d}": 0.5 for n in lengths for d in (0, 1)},
            },
        )
        for name in range(8)
    ]
    plots = Plots(sweep_of(*points), tmp_path)
    assert len(names([*plots.heat_maps(), *plots.scores_by_parameters()])) == 9
    assert max(figure.get_size_inches()[0] for figure in drawn) < 25
    figure = drawn[-1]
    [axes], [legend] = figure.axes, figure.legends
    figure.draw_without_rendering()
    assert legend.get_window_extent().y1 < axes.get_window_extent().y0, "it covers nothing"
    marks = [container.lines[0] for container in axes.containers]
    assert len({(line.get_color(), line.get_marker()) for line in marks}) == 8
    assert axes.get_xlim()[0] < 100 < axes.get_xlim()[1]
    assert [list(line.get_xdata()) for line in marks] == [[100.0]] * 8
    assert len({line.get_transform().transform((100.0, 0.5))[0] for line in marks}) == 8, "none hides another"


def test_many_cases(drawn: list[Any], tmp_path: Path) -> None:
    points = [
        result(
            f"method{index}",
            0,
            {f"task/keys/{n}/{d}": 0.5 for n in (64, 128) for d in (0, 1)} | {"task/keys/64": 0.5},
        )
        for index in range(12)
    ]
    plots = Plots(sweep_of(*points), tmp_path)
    assert names(plots.heat_maps()) == [f"keys_heat_map{suffix}.png" for suffix in ("", "_2", "_3")]
    assert [len(figure.axes) - 1 for figure in drawn] == [4, 4, 4]
    plots.scores_by_length()
    lines = drawn[-1].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12, "each looks different"
