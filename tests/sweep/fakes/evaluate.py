"""Stands in for launch/evaluate.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

arguments = sys.argv[1:]
adapter = Path(arguments[arguments.index("--adapter") + 1])
assert "--no-base" in arguments
assert arguments[-2:] == ["--set", "tracking.tracker=none"]


def group(mean: float, **of: float) -> dict[str, object]:
    return {"group": of, "num_items": 4, "num_failed": 0, "metrics": {"acc": {"mean": mean}}}


own = [
    group(0.5),
    group(0.75, length=64),
    group(0.5, depth=0.5),
    group(1.0, length=64, depth=0.5),
    {"group": {"length": 128}, "num_items": 0, "num_failed": 4, "metrics": {}},
]
evaluation = adapter.parent / "evaluation"
evaluation.mkdir(exist_ok=True)
tasks = [{"task": "passkey", "metric": "acc", "models": {"adapter": own}}]
(evaluation / "summary.json").write_text(json.dumps({"tasks": tasks}))
