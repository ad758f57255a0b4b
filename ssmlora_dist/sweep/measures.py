"""The metrics of a point's row, read from its run directory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.teacher_forced import OVERALL

SUMMARY_FILE = "summary.json"
EVALUATED_MODEL = "adapter"
_PLAIN = (
    "tokens_per_second",
    "tokens_per_second_per_device",
    "target_tokens_per_second",
    "num_trainable_parameters",
)
_SCORES = ("loss", "exact_match")
_REMEDY = "to run the point again, remove the directory of this file and start with --retry-failed"


def measures(run: Path, *, with_tasks: bool) -> dict[str, float]:
    """What the summaries of a run and of its evaluation say, as far as it is a finite number.

    Returns:
        `final_loss`, `validation_loss_before` and `_after`, `validation_exact_match_before` and `_after`
        (over all examples, and behind `/LENGTH` of each length), `tokens_per_second`,
        `tokens_per_second_per_device`, `target_tokens_per_second`, `peak_memory_gib` (the largest of all
        ranks), `num_ranks`, `num_trainable_parameters`, `step_seconds` (their mean), and `task/NAME`,
        `task/NAME/LENGTH` and `task/NAME/LENGTH/DEPTH`, the means of the metrics that stand for the tasks.

    Raises:
        DataError: a summary is missing, cannot be read or holds something else.
    """
    found = dict(_each_of(run / SUMMARY_FILE, _of_run))
    if with_tasks:
        found.update(_each_of(run / "evaluation" / SUMMARY_FILE, _of_tasks))
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def run_seconds(run: Path) -> float:
    """Wall time of a finished training, over all the times it was started.

    Raises:
        DataError: as for `measures`.
    """
    seconds = _read(run / SUMMARY_FILE).get("wall_seconds")
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _each_of(
    path: Path, measured: Callable[[dict[str, Any]], Iterable[tuple[str, Any]]]
) -> list[tuple[str, Any]]:
    summary = _read(path)
    try:
        return list(measured(summary))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{path}: is no summary ({type(error).__name__}: {error}); {_REMEDY}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no object; {_REMEDY}")
    return content


def _of_run(summary: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "final_loss", summary.get("last_loss")
    for name in _PLAIN:
        yield name, summary.get(name)
    peaks = summary.get("peak_memory_gib") or []
    if peaks:
        yield "peak_memory_gib", max(peaks)
        yield "num_ranks", len(peaks)
    if summary.get("num_steps"):
        yield "step_seconds", summary["training_seconds"] / summary["num_steps"]
    for moment, scores in (summary.get("evaluation") or {}).items():
        for length, score in (scores or {}).items():
            suffix = "" if length == OVERALL else f"/{length}"
            for name in _SCORES:
                yield f"validation_{name}_{moment}{suffix}", score.get(name)


def _of_tasks(summary: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for task in summary["tasks"]:
        for found in task["models"].get(EVALUATED_MODEL, []):
            suffix = _suffix(found["group"])
            score = found["metrics"].get(task["metric"])
            if suffix is not None and score is not None:
                yield f"task/{task['task']}{suffix}", score["mean"]


def _suffix(group: dict[str, Any]) -> str | None:
    """The end of a metric's name; None for groups by depth alone."""
    if set(group) == {"length", "depth"}:
        return f"/{group['length']}/{group['depth']:g}"
    if set(group) == {"length"}:
        return f"/{group['length']}"
    return None if group else ""
