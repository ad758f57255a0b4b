"""The benchmark of long inputs: its sweep is one that can run, and its rows say what the repeats came to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.long_context import FEATURES, row_of, sweep_of
from ssmlora_dist.sweep.plan import plan_sweep

ROOT = Path(__file__).parents[2]
GIB = 2**30


def test_every_feature_is_a_run_at_every_length(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        config=ROOT / "configs" / "debug_tiny.json",
        lengths=[256, 512],
        features=list(FEATURES),
        ranks=2,
        steps=3,
        repeats=2,
        random_weights=True,
        tasks=True,
    )
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(sweep_of(arguments)))
    points = plan_sweep(str(file)).points
    assert len(points) == len(FEATURES) * 2 * 2
    pairs = [(one.point.group, one.config.data.max_length) for one in points]
    assert pairs[: len(pairs) // 2] == pairs[len(pairs) // 2 :], "every pair once before any is repeated"
    assert len(set(pairs)) == len(pairs) // 2
    spared = next(one for one in points if one.point.group == "all-memory").config.training
    assert (spared.mlp_tile_size, spared.layers_per_checkpoint, spared.offload_checkpoints) == (1024, 4, True)
    shared = [one for one in points if one.point.ranks == 2]
    assert {one.config.parallel.sequence_parallel for one in shared} == {2}
    assert {one.config.parallel.zero_stage for one in shared} == {0, 3}


def point(name: str, outcome: str, metrics: dict[str, float]) -> dict[str, Any]:
    reason = None if outcome == "finished" else "CUDA out of memory"
    overrides = {"launcher.ranks": 2}
    return {
        "point": name,
        "outcome": outcome,
        "reason": reason,
        "metrics": metrics,
        "overrides": overrides,
    }


def test_a_row_has_medians_behind_the_first_step_and_says_what_failed(tmp_path: Path) -> None:
    for name, seconds, peak in (("a", [9.0, 1.0, 2.0], 3.0), ("b", [8.0, 3.0], 2.0)):
        (tmp_path / name).mkdir()
        rows = [
            {
                "step": step,
                "loss": 1.0,
                "step_seconds": each,
                "tokens_per_second": 100 / each,
                "target_tokens_per_second": 10 / each,
                "padding_share": 0.0,
            }
            for step, each in enumerate(seconds, start=1)
        ]
        other = {"step": 3, "validation_loss": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows, other])
        )
        summary = {"peak_memory_gib": [1.0, peak], "loaded_memory_gib": [1.0, 1.0]}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    points = [point("a", "finished", {"task/niah_multikey_2": 0.5}), point("b", "finished", {})]
    row = row_of("tiled-mlp", 512, points, tmp_path)
    assert row["status"] == "finished"
    assert row["reason"] is None
    assert (row["repeats"], row["step_seconds"], row["tokens_per_second"]) == (2, 2.0, 50.0)
    assert row["bytes_per_token_of_a_rank"] == 2 * GIB / 256
    assert row["exact_match"] == [0.5, None]
    row = row_of("tiled-mlp", 512, [points[0], point("c", "out_of_memory", {})], tmp_path)
    assert (row["status"], row["reason"], row["repeats"]) == ("out_of_memory", "CUDA out of memory", 1)
    row = row_of("tiled-mlp", 512, [point("c", "out_of_memory", {})], tmp_path)
    assert row["step_seconds"] is row["bytes_per_token_of_a_rank"] is None
