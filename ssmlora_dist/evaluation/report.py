"""Results side by side: what a task's items scored under each model, as rows, as a table and as pictures."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssmlora_dist.evaluation.items import FailedItem, Item, Task
from ssmlora_dist.evaluation.plots import plot_by_length, plot_heat_maps
from ssmlora_dist.evaluation.statistics import (
    Baseline,
    GroupSummary,
    ItemScores,
    majority_baseline,
    summarize,
)

Rows = Sequence[Mapping[str, Any]]
HEADING = ("task", "length", "items", "failed", "metric", "majority")


@dataclass(frozen=True)
class TaskReport:
    """One task under every model.

    Attributes:
        task: its name.
        metric: the score that stands for it.
        majority: what always giving one answer scores; None where nothing could be counted. Of the items that
            have a score, as the models' means are.
        majority_by_length: the same of the items of each input length.
        models: what is compared, such as `base` and `adapter`, to the summaries of `statistics.summarize`.
    """

    task: str
    metric: str
    majority: Baseline | None
    majority_by_length: Mapping[int, Baseline]
    models: Mapping[str, Sequence[GroupSummary]]

    @property
    def lengths(self) -> list[int]:
        """Input lengths that its items were made for; none where they are as long as they are."""
        summaries = next(iter(self.models.values()))
        return [summary.group["length"] for summary in summaries if set(summary.group) == {"length"}]

    def summary(self, model: str, **group: Any) -> GroupSummary | None:
        """What the items of a group scored under one model."""
        return next((found for found in self.models[model] if found.group == group), None)


def build_reports(
    tasks: Sequence[Task], rows_by_model: Mapping[str, Rows], *, with_majority: bool = True
) -> list[TaskReport]:
    """Reports on `tasks`, in their order.

    Args:
        tasks: that were run.
        rows_by_model: what is compared to the rows that `runner.run` gave.
        with_majority: whether to work out what always giving one answer scores.
    """
    reports = []
    for task in tasks:
        own = {
            model: [row for row in rows if row["task"] == task.name] for model, rows in rows_by_model.items()
        }
        models = {
            model: summarize([ItemScores(row.get("scores"), row["metadata"]) for row in rows])
            for model, rows in own.items()
        }
        scored = {row["id"] for rows in own.values() for row in rows if "scores" in row}
        majorities = _majorities(task, scored) if with_majority else {}
        overall = majorities.pop(None, None)
        by_length = {length: baseline for length, baseline in majorities.items() if length is not None}
        reports.append(TaskReport(task.name, task.metric, overall, by_length, models))
    return reports


def _majorities(task: Task, ids: Container[str]) -> dict[int | None, Baseline]:
    """Over the items named, under None, and over those of each length."""
    items = [item for item in task.items() if item.id in ids and not isinstance(item, FailedItem)]
    groups: dict[int | None, list[Item]] = {None: items}
    for item in items:
        if item.metadata.get("length") is not None:
            groups.setdefault(item.metadata["length"], []).append(item)
    found = {length: majority_baseline(group, task.score, task.metric) for length, group in groups.items()}
    return {length: baseline for length, baseline in found.items() if baseline is not None}


def plain(reports: Sequence[TaskReport]) -> list[dict[str, Any]]:
    """In JSON types, all groups and metrics."""
    return [asdict(report) for report in reports]


def metrics_of(reports: Sequence[TaskReport]) -> dict[str, float]:
    """For a tracker: `MODEL/TASK` and `MODEL/TASK/LENGTH` to the mean of the task's metric.

    Where items failed, `MODEL/TASK/num_failed` says how many.
    """
    values: dict[str, float] = {}
    for report in reports:
        for model in report.models:
            overall = report.summary(model)
            if overall is not None and overall.num_failed:
                values[f"{model}/{report.task}/num_failed"] = overall.num_failed
            for length in (None, *report.lengths):
                found = report.summary(model, **({} if length is None else {"length": length}))
                if found is not None and found.metrics:
                    name = f"{model}/{report.task}" + ("" if length is None else f"/{length}")
                    values[name] = found.metrics[report.metric].mean
    return values


def markdown_table(reports: Sequence[TaskReport]) -> str:
    """A line for each task over all its items, and one for each input length; intervals are of 95%."""
    models = list(reports[0].models) if reports else []
    lines = [(*HEADING, *models)]
    for report in reports:
        for length in (None, *report.lengths):
            group = {} if length is None else {"length": length}
            found = [report.summary(model, **group) for model in models]
            majority = report.majority if length is None else report.majority_by_length.get(length)
            lines.append(
                (
                    report.task,
                    "all" if length is None else f"{length:,}",
                    _counts(summary.num_items for summary in found if summary),
                    _counts(summary.num_failed for summary in found if summary),
                    report.metric,
                    _percent(majority.score) if majority else "-",
                    *(_shown(summary, report.metric) for summary in found),
                )
            )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([rows[0], rule, *rows[1:]])


def draw(reports: Sequence[TaskReport], directory: Path) -> list[Path]:
    """Writes `TASK_by_length.png` and, of tasks with depths, `TASK_heat_map.png`; says what was written."""
    written = []
    for report in reports:
        name = re.sub(r"[^\w.-]", "_", report.task)
        curves: dict[str, dict[int, tuple[float, float, float]]] = {}
        cells: dict[str, dict[tuple[int, float], float]] = {}
        for model, summaries in report.models.items():
            for summary in summaries:
                if not summary.metrics:
                    continue
                found, group = summary.metrics[report.metric], summary.group
                if set(group) == {"length"}:
                    curve = curves.setdefault(model, {})
                    curve[group["length"]] = (found.mean, found.lower, found.upper)
                elif set(group) == {"length", "depth"}:
                    cells.setdefault(model, {})[group["length"], group["depth"]] = found.mean
        if curves:
            written.append(directory / f"{name}_by_length.png")
            plot_by_length(curves, f"{report.task}: {report.metric} by input length", written[-1])
        if cells:
            written.append(directory / f"{name}_heat_map.png")
            plot_heat_maps(cells, f"{report.task}: {report.metric} in percent", written[-1])
    return written


def _counts(numbers: Iterable[int]) -> str:
    """One where all models have the same, else each one's."""
    shown = list(map(str, numbers))
    return shown[0] if len(set(shown)) == 1 else "/".join(shown)


def _shown(summary: GroupSummary | None, metric: str) -> str:
    if summary is None or not summary.metrics:
        return "-"
    found = summary.metrics[metric]
    return f"{_percent(found.mean)} [{100 * found.lower:.1f}, {100 * found.upper:.1f}]"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
