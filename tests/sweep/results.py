"""Rows of sweeps that were never run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssmlora_dist.sweep.cases import Sweep, ordered_sweep
from ssmlora_dist.sweep.rows import PointResult

REASON = "CUDA out of memory. Tried to allocate 2.50 GiB"


def result(
    group: str,
    seed: int = 0,
    metrics: Mapping[str, float] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **others: Any,
) -> PointResult:
    """A point that finished, unless another outcome is given."""
    own = dict(overrides or {})
    name = "-".join([group, *map(str, own.values()), f"seed{seed}"])
    fields = {"name": name, "outcome": "finished"} | others
    return PointResult(group=group, seed=seed, metrics=metrics or {}, overrides=own, **fields)


def lost(group: str, seed: int = 0, outcome: str = "out_of_memory", **others: Any) -> PointResult:
    """A point that did not finish."""
    return result(group, seed, outcome=outcome, **{"reason": REASON} | others)


def sweep_of(*points: PointResult, baseline: str | None = None) -> Sweep:
    """A sweep of these points."""
    return ordered_sweep("trial", points, baseline=baseline)


def row_of(point: PointResult) -> dict[str, Any]:
    """As it stands in points.jsonl."""
    return {
        "point": point.name,
        "digest": "0",
        "overrides": point.overrides,
        "group": point.group,
        "seed": point.seed,
        "outcome": point.outcome,
        "reason": point.reason,
        "exit_code": 0,
        "wall_seconds": point.wall_seconds,
        "metrics": point.metrics,
        "mlflow_run_id": None,
    }


def write_rows(path: Path, rows: Iterable[PointResult | Mapping[str, Any] | str]) -> Path:
    """Writes points, rows or lines as they are, a line each."""
    lines = [
        row if isinstance(row, str) else json.dumps(row_of(row) if isinstance(row, PointResult) else row)
        for row in rows
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def full_sweep() -> list[PointResult]:
    """Two methods at two lengths and on two topologies with three seeds; one case ran out of memory."""
    points = []
    for group, gain in (("lora", 0.0), ("ssmlora", 0.1)):
        for length in (256, 1024):
            for ranks in (1, 2):
                for seed in (0, 1, 2):
                    overrides = {"data.max_length": length, "launcher.ranks": ranks, "run.seed": seed}
                    if (group, length, ranks) == ("lora", 1024, 1):
                        points.append(lost(group, seed, overrides=overrides))
                        continue
                    rate = 1000.0 - length / 4 - 100 * (ranks - 1) - seed
                    metrics = {
                        "final_loss": 2.0 - gain + seed / 100,
                        "validation_exact_match_before": 0.0,
                        "validation_exact_match_after": 0.5 + gain + seed / 100,
                        "tokens_per_second": rate * ranks,
                        "tokens_per_second_per_device": rate,
                        "num_ranks": float(ranks),
                        "peak_memory_gib": length / 512,
                        "num_trainable_parameters": 2048.0 if group == "lora" else 1024.0,
                        "task/keys": 0.6 + gain,
                        f"task/keys/{length}": 0.6 + gain + seed / 50,
                        f"task/keys/{length}/0": 0.7 + gain,
                        f"task/keys/{length}/0.5": 0.5 + gain,
                    }
                    points.append(result(group, seed, metrics, overrides, wall_seconds=60.0))
    return points
