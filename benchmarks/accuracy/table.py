"""The study in a table, its decisions and its curves: `python benchmarks/accuracy/table.py`.

Written from the rows alone, beside them: a Markdown file, and for every task set and length a picture of the
validation loss against the rate. What the numbers are is said in README.md.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# The study lies beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy import plan
from benchmarks.accuracy.decisions import DECIDING_TASKS, Cells, Comparison, Decision, cells, compare, decide
from benchmarks.accuracy.plan import METHODS, TASK_SETS, Row
from benchmarks.accuracy.rows import read_rows
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.durable import replacing
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.plots import (
    COLORS,
    LINE_STYLES,
    MARKERS,
    add_legend,
    new_figure,
    write_figure,
)
from ssmlora_dist.evaluation.statistics import student_t_estimate

BASELINE = "lora"
NONE = "-"
METHOD_COLUMNS = (
    "task",
    "method",
    "parameters",
    "rate",
    "seeds",
    "loss (nats)",
    "accuracy (%)",
    f"better than {BASELINE} by (nats)",
    "bootstrap",
    "detectable",
    "worth of the state (nats)",
)
DECISION_COLUMNS = (
    "hypothesis",
    "comparison",
    "difference",
    "one-sided, from",
    "bootstrap",
    "detectable",
    "pairs",
    "p",
    "p after Holm",
    "verdict",
)
HYPOTHESES = {
    "H1": "half the insertions are not worse",
    "H2": "the paper's form beats LoRA",
    "H3": "the paper's form beats its controls",
    "H4": "the gated form beats all",
    "H5": "the difference grows with length",
    "H6": "probed places beat alternate q/v",
}


def document(rows: Sequence[Row], pictures: Iterable[Path] = ()) -> str:
    """The Markdown text.

    Args:
        rows: of the study.
        pictures: files beside it.
    """
    found, lengths = cells(rows), sorted({row["length"] for row in rows})
    blocks = [
        "# Accuracy study",
        "Brackets: 95% intervals, Student's t over seeds; for what each column is see "
        "`benchmarks/accuracy/README.md`.",
        "## Decisions",
        _table(DECISION_COLUMNS, [line for each in decide(rows, lengths[0]) for line in _decision(each)]),
    ]
    for length in lengths:
        blocks += [f"## {length:,} tokens", _table(METHOD_COLUMNS, list(_methods(found, rows, length)))]
    return "\n\n".join([*blocks, *(f"![{each.stem}]({each.name})" for each in pictures)]) + "\n"


def _decision(decision: Decision) -> Iterable[Sequence[str]]:
    name = f"{decision.name} {HYPOTHESES[decision.name]}"
    if not decision.parts:
        yield name, *[NONE] * (len(DECISION_COLUMNS) - 2), decision.verdict
    for part in decision.parts:
        digits = _digits(part.measure)
        yield (
            name,
            part.name,
            f"{_signed(part.mean, digits)} {_interval(part.interval, digits)} {part.measure}",
            f"{_signed(part.lower, digits)} (above {part.margin:g})",
            _interval(part.bootstrap, digits),
            f"{part.detectable:.{digits}f}",
            str(len(part.differences)),
            f"{part.p:.3f}",
            f"{decision.adjusted_p:.3f}",
            decision.verdict,
        )


def _methods(found: Cells, rows: Sequence[Row], length: int) -> Iterable[Sequence[str]]:
    runs = plan.done(rows)
    for task_set, tasks in TASK_SETS.items():
        for task in tasks:
            for method in METHODS:
                by_seed = found.get((method, task, length), {})
                losses = plan.tuned_losses(runs, (task_set, length, method))
                if by_seed:
                    yield task, *_method(found, method, task, length, losses)
    for method in METHODS:
        if method != BASELINE and (mean := compare(found, method, BASELINE, DECIDING_TASKS, length, "nats")):
            seeds = str(len(mean.differences))
            yield "all three", method, NONE, NONE, seeds, NONE, NONE, *_difference(mean), NONE


def _method(
    found: Cells, method: str, task: str, length: int, losses: Mapping[float, float]
) -> Iterable[str]:
    of_seeds = list(found[method, task, length].values())
    ended = [row for row in of_seeds if row["loss"] is not None]
    sizes = sorted({row["parameters"] for row in of_seeds})
    diverged = len(of_seeds) - len(ended)
    yield method
    yield " to ".join(dict.fromkeys(f"{size:,}" for size in (sizes[0], sizes[-1])))
    yield ", ".join(_rate(rate, losses) for rate in sorted({row["rate"] for row in of_seeds}))
    yield str(len(of_seeds)) + (f", {diverged} diverged" if diverged else "")
    yield _mean([row["loss"] for row in ended], 3)
    yield _mean([100 * row["accuracy"] for row in ended], 1)
    difference = None if method == BASELINE else compare(found, method, BASELINE, [task], length, "nats")
    yield from _difference(difference)
    worth = [row["loss_mean_state"] - row["loss"] for row in ended if row.get("loss_mean_state") is not None]
    yield _mean(worth, 4)


def _difference(comparison: Comparison | None) -> Iterable[str]:
    if comparison is None:
        return NONE, NONE, NONE
    digits = _digits(comparison.measure)
    return (
        f"{_signed(comparison.mean, digits)} {_interval(comparison.interval, digits)}",
        _interval(comparison.bootstrap, digits),
        f"{comparison.detectable:.{digits}f}",
    )


def _rate(rate: float, losses: Mapping[float, float]) -> str:
    is_edge = bool(losses) and rate in (min(losses), max(losses))
    return f"{rate:g}" + (" (edge of the grid)" if is_edge else "")


def _digits(measure: str) -> int:
    return 3 if measure == "nats" else 2


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return NONE
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    estimate = student_t_estimate(values)
    return f"{estimate.mean:.{digits}f} {_interval((estimate.lower, estimate.upper), digits)}"


def _interval(interval: tuple[float, float] | None, digits: int) -> str:
    return NONE if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *map(list, lines))
    )


def plot_rates(rows: Sequence[Row], task_set: str, length: int, path: Path) -> None:
    """Draws validation loss against rate, a line for each method, its best ringed; writes a PNG.

    What has diverged is left out.
    """
    runs = plan.done(rows)
    figure, canvas = new_figure((7, 4))
    axes = figure.subplots()
    for index, method in enumerate(METHODS):
        losses = {
            rate: loss
            for rate, loss in plan.tuned_losses(runs, (task_set, length, method)).items()
            if math.isfinite(loss)
        }
        if not losses:
            continue
        color = COLORS[index % len(COLORS)]
        style = LINE_STYLES[index // len(COLORS)]
        marker = MARKERS[index % len(MARKERS)]
        values = list(losses.values())
        axes.plot(
            list(losses), values, color=color, linestyle=style, marker=marker, markersize=4, label=method
        )
        best = min(losses, key=losses.__getitem__)
        axes.plot([best], [losses[best]], "o", markersize=10, fillstyle="none", color=color)
    axes.set_xscale("log", base=2)
    rates = sorted({run.rate for run in runs if (run.task_set, run.length) == (task_set, length)})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss (nats)")
    axes.grid(alpha=0.3)
    add_legend(figure, axes)
    tasks = ", ".join(TASK_SETS[task_set])
    write_figure(figure, canvas, f"Loss against rate: {tasks}, {length:,} tokens", path)


def write(rows: Sequence[Row], path: Path) -> list[Path]:
    """Writes the Markdown file and its pictures beside it; returns all."""
    runs = plan.done(rows)
    # There is something to draw once a rate has ended with all its seeds.
    tuned = {
        (run.task_set, run.length)
        for run in runs
        if any(map(math.isfinite, plan.tuned_losses(runs, (run.task_set, run.length, run.method)).values()))
    }
    pictures = []
    for task_set, length in sorted(tuned):
        pictures.append(path.with_name(f"{path.stem}_rates_{task_set}_{length}.png"))
        plot_rates(rows, task_set, length, pictures[-1])
    with replacing(path) as beside:
        beside.write_text(document(rows, pictures), encoding="utf-8")
    return [path, *pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write table, decisions and curves of the accuracy study.")
    plan.add_rows_argument(parser)
    parser.add_argument(
        "--more-rows",
        type=path_argument,
        nargs="+",
        default=[],
        metavar="FILE",
        help="of other lengths, such as of a GPU",
    )
    arguments = parser.parse_args()
    rows = [row for path in (arguments.rows, *arguments.more_rows) for row in read_rows(path)]
    if not rows:
        raise DataError(f"{arguments.rows}: has no rows; start `python benchmarks/accuracy/study.py` first")
    for path in write(rows, arguments.rows.with_suffix(".md")):
        print(path)


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
