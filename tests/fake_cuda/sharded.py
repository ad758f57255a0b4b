"""Traces steps with DeepSpeed, in a process of its own: `python -m tests.fake_cuda.sharded`.

The last line is JSON: of each ZeRO stage, and of one rank without DeepSpeed, what a step asks for.
"""

from __future__ import annotations

import json
from typing import Any

from tests.fake_cuda.cases import SHIPPED, traced

STAGES = (0, 1, 2, 3)
NUM_RANKS = 2


MICRO_BATCHES = 2


def found(**ranks: Any) -> dict[str, Any]:
    step = traced(
        rows=1, padding=0, tokens=48, micro_batches=MICRO_BATCHES, adapter__every_layer=SHIPPED, **ranks
    )
    return {"bytes": step.bytes_by_kind, "launches": step.launches, "syncs": [list(s) for s in step.syncs]}


def main() -> None:
    results = {"alone": found()}
    for stage in STAGES:
        results[str(stage)] = found(num_ranks=NUM_RANKS, parallel__zero_stage=stage)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
