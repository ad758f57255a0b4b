"""What `launch/estimate.py` proposes for well-known models on three machines, and what that traces to.

    python benchmarks/planner.py

The shipped configuration's adapter and batch, rows of 4,096 tokens. A proposal of ranks by themselves is
traced at 4 and 6 decoder layers (`ssmlora_dist.fake_cuda`), from which the rest follow; other ones are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

# The benchmarks lie beside the package's scripts.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.fake_cuda.step import trace_step
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row
from ssmlora_dist.training.planner import GIB, Planner, changes

RESULTS = Path(__file__).parent / "results" / "planner.jsonl"
CONFIG = Path(__file__).parents[1] / "configs" / "llama_ssmlora.json"
MODELS = ("llama2-7b", "llama3-8b", "llama2-13b", "llama2-70b")
MACHINES = ((1, 24), (1, 80), (8, 80))
TRACED_LAYERS = (4, 6)


def config_of(shapes: dict[str, Any], num_devices: int) -> RunConfig:
    """The shipped configuration for a model of random weights."""
    given = {
        "model.path": None,
        "model.init": "random",
        "model.tokenizer": "bytes",
        "model.compute_dtype": "bfloat16",
        "model.config": shapes,
        "data.max_length": 4096,
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    return load_config(CONFIG, overrides, world_size=num_devices, check_files=False)


def traced_bytes(config: RunConfig, num_layers: int) -> int:
    """The peak of a step of one rank by itself."""
    rows = config.training.micro_batch_size
    few, more = (
        trace_step(config, num_layers=number, tokens=config.data.max_length, rows=rows).peak_bytes
        for number in TRACED_LAYERS
    )
    return few + (more - few) * (num_layers - TRACED_LAYERS[0]) // (TRACED_LAYERS[1] - TRACED_LAYERS[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=path_argument, default=RESULTS, metavar="FILE")
    arguments = parser.parse_args()
    quiet_libraries()
    for name in MODELS:
        shapes = SHAPES[name]
        for num_devices, memory_gib in MACHINES:
            began = time.perf_counter()
            config = config_of(shapes, num_devices)
            planner = Planner(config, num_devices, memory_gib)
            best = planner.best()
            seconds = time.perf_counter() - began
            traced = None
            if best and best.config.parallel == config.parallel:
                traced = traced_bytes(best.config, shapes["num_hidden_layers"])
            planned = best.memory.total - best.memory.reserve if best else None
            row = {
                "model": name,
                "devices": num_devices,
                "device_memory_gib": memory_gib,
                "planned_in_seconds": seconds,
                "settings": changes(config, best.config) if best else None,
                "planned_gib": planned and planned / GIB,
                "traced_gib": traced and traced / GIB,
                "allocatable_gib": (planner.memory_bytes - planner.plan(config).memory.reserve) / GIB,
                "step_seconds_at_best": best.seconds if best else None,
                "longest_rows": planner.longest_rows(offload=False)[0],
                "longest_rows_offloaded": planner.longest_rows(offload=True)[0],
            }
            append_row(arguments.out, row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
