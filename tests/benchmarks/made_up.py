"""Rows of the accuracy study as they might be, without a training."""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy.plan import TASK_SETS

NUM_TEXTS, TARGETS = 4, 5


def row(
    method: str = "lora",
    task: str = "needles",
    seed: int = 201,
    loss: float | None = 1.0,
    *,
    phase: str = "final",
    length: int = 144,
    rate: float = 0.005,
    correct: int = 2,
    **more: Any,
) -> dict[str, Any]:
    """One, in which all texts have the same loss for a token and as many right ones of `TARGETS`."""
    task_set = next(name for name, tasks in TASK_SETS.items() if task in tasks)
    texts = {
        "targets": [TARGETS] * NUM_TEXTS,
        "correct": [correct] * NUM_TEXTS,
        "losses": [None if loss is None else loss * TARGETS] * NUM_TEXTS,
    }
    return {
        "phase": phase,
        "task_set": task_set,
        "length": length,
        "method": method,
        "rate": rate,
        "seed": seed,
        "task": task,
        "loss": loss,
        "accuracy": correct / TARGETS,
        "parameters": 100,
        "cpu_seconds": 1.0,
        **({"texts": texts} if phase == "final" else {}),
        **more,
    }


def run_rows(task_set: str, **settings: Any) -> list[dict[str, Any]]:
    """Those of one run."""
    return [row(task=task, **settings) for task in TASK_SETS[task_set]]
