"""Speed and memory of training by input length, with and without what spares them, each a run of a sweep.

    python benchmarks/long_context.py --config configs/llama3_8b_ssmlora.json --lengths 4096 16384 65536
    python benchmarks/long_context.py --config configs/quickstart.json --lengths 512 1024 --repeats 2 --tasks

Every pair of length and feature is trained for a few steps on a generated task of that length, one row a
micro-batch, `--repeats` times, each pair once before any is repeated. The sweep, `sweeps/long_context/`, has
the logs, a report with curves and, in MLflow, a run for each; stopped, it goes on with the same command. Each
pair has a row in `benchmarks/results/long_context.jsonl`: medians over repeats of the steps behind the first,
or what it died of. `--tasks` has the trained adapter answer the task, for accuracy by length beside them.
What packing gains is measured by packing.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The benchmarks lie beside the package's scripts.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.durable import write_text
from ssmlora_dist.errors import EXIT_DONE, EXIT_TRAINING_FAILED
from ssmlora_dist.sweep.expansion import RANKS_KEY
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row

RESULTS = Path(__file__).parent / "results" / "long_context.jsonl"
SWEEP_SCRIPT = Path(__file__).parents[1] / "launch" / "sweep.py"
TASK = "niah_multikey_2"
_TILED = {"training.mlp_tile_size": 1024}
_SHARED = {"training.layers_per_checkpoint": 4}
_OFFLOADED = {"training.offload_checkpoints": True}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiled-mlp": _TILED,
    "shared-checkpoints": _SHARED,
    "offloaded-checkpoints": _OFFLOADED,
    "all-memory": _TILED | _SHARED | _OFFLOADED,
    "sequence-parallel": {},
    "sequence-parallel-zero-3": {"parallel.zero_stage": 3},
}


def sweep_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sweep file: lengths x features, with seeds for repeats."""
    shared = {
        "model.init": "random" if arguments.random_weights else "pretrained",
        "data.validation": None,
        "data.train": {"format": "task", "task": {"task": TASK, "num_examples": 4 * arguments.steps}},
        "training.num_epochs": None,
        "training.max_steps": arguments.steps,
        "training.warmup_steps": 1,
        "training.micro_batch_size": 1,
        "training.gradient_checkpointing": True,
        "training.layers_per_checkpoint": 1,
        "training.offload_checkpoints": False,
        "training.mlp_tile_size": None,
        "evaluation.every_steps": None,
        "evaluation.num_examples": None,
        "checkpoint.every_steps": None,
        "tracking.log_adapter": False,
    }
    features = {}
    for name in arguments.features:
        ranks = arguments.ranks if name.startswith("sequence-parallel") else 1
        features[name] = {
            **FEATURES[name],
            RANKS_KEY: ranks,
            "parallel.sequence_parallel": ranks,
            "training.global_batch_size": 1,
        }
    lengths = {
        str(length): {
            "data.max_length": length,
            "data.train.task.lengths": [length],
            "evaluation.tasks": [{"task": TASK, "lengths": [length], "num_examples": 50}],
        }
        for length in arguments.lengths
    }
    return {
        "name": "long_context",
        "base": str(arguments.config),
        "overrides": shared,
        "grid": {"length": lengths, "feature": features},
        "seeds": list(range(arguments.repeats)),
        "group_by": ["feature"],
        "evaluate_tasks": arguments.tasks,
    }


def row_of(feature: str, length: int, points: Sequence[Mapping[str, Any]], runs: Path) -> dict[str, Any]:
    """What the repeats of a pair came to; figures are None where none of them finished."""
    finished = [point for point in points if point["outcome"] == "finished"]
    failed = next((point for point in points if point["outcome"] != "finished"), None)
    steps = [step for point in finished for step in steps_of(runs / point["point"])]
    summaries = [json.loads((runs / point["point"] / "summary.json").read_text()) for point in finished]

    def median(name: str) -> float | None:
        return statistics.median(step[name] for step in steps) if steps else None

    peaks = [max(summary["peak_memory_gib"]) for summary in summaries]
    loaded = [max(summary["loaded_memory_gib"]) for summary in summaries]
    ranks = points[0]["overrides"][RANKS_KEY]
    added = [(peak - before) * 2**30 for peak, before in zip(peaks, loaded, strict=True)]
    return {
        "feature": feature,
        "length": length,
        "ranks": ranks,
        "status": failed["outcome"] if failed else "finished",
        "reason": failed["reason"] if failed else None,
        "repeats": len(finished),
        "step_seconds": median("step_seconds"),
        "tokens_per_second": median("tokens_per_second"),
        "target_tokens_per_second": median("target_tokens_per_second"),
        "padding_share": median("padding_share"),
        "peak_memory_gib_of_a_rank": max(peaks, default=None),
        "loaded_memory_gib_of_a_rank": max(loaded, default=None),
        "bytes_per_token_of_a_rank": max(added) / (length / ranks) if added else None,
        "exact_match": [point["metrics"].get(f"task/{TASK}") for point in finished],
    }


def steps_of(run: Path) -> list[dict[str, float]]:
    """The rows of a run's steps behind the first, which pays for what is done once."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row and row["step"] > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--config", type=path_argument, required=True, metavar="FILE", help="of a run: model and adapter")
    add("--lengths", type=int, nargs="+", required=True, metavar="N", help="tokens of a row")
    add("--features", nargs="+", choices=list(FEATURES), default=list(FEATURES), metavar="NAME")
    add("--ranks", type=int, default=2, metavar="N", help="that share a row (default: %(default)s)")
    add("--steps", type=int, default=6, metavar="N", help="of a run (default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="(default: %(default)s)")
    add("--random-weights", action="store_true", help="train no weights but random ones of the shapes")
    add("--tasks", action="store_true", help="have the trained adapters answer the task")
    add("--out", type=path_argument, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    arguments = parser.parse_args()
    quiet_libraries()
    directory = Path("sweeps") / "long_context"
    file = directory.with_suffix(".json")
    file.parent.mkdir(exist_ok=True)
    write_text(file, json.dumps(sweep_of(arguments), indent=2))
    code = subprocess.run([sys.executable, str(SWEEP_SCRIPT), "--config", str(file)], check=False).returncode
    points = directory / "points.jsonl"
    if code not in (EXIT_DONE, EXIT_TRAINING_FAILED):
        return code
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in map(json.loads, points.read_text(encoding="utf-8").splitlines()):
        found.setdefault((point["group"], point["overrides"]["data.max_length"]), []).append(point)
    for (feature, length), of_pair in found.items():
        append_row(arguments.out, row_of(feature, length, of_pair, directory / "runs"))
    return code


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
