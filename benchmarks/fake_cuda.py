"""A training step on CUDA tensors that do not exist: `python benchmarks/fake_cuda.py`.

Peak bytes by kind, launches of a decoder layer and of an adapted linear layer, bytes moved, and host
synchronisations, of Llama's shapes in NF4 with `configs/llama_ssmlora.json` as shipped and with q_proj and
v_proj alone. The project's own step runs on tensors that have shapes but no storage
(`ssmlora_dist.fake_cuda`), at 2 and 4 decoder layers: every two more add the same. No time is measured, and
no GPU is needed. What is within an operator, gaps of the allocator, the CUDA context and what DeepSpeed does
are not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ssmlora_dist.config.arguments import path_argument, run_command
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.fake_cuda.step import Traced, trace_step
from ssmlora_dist.fake_cuda.watch import BACKWARD, FORWARD, RECOMPUTE
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row

CONFIG = Path(__file__).parents[1] / "configs" / "llama_ssmlora.json"
RESULTS = Path(__file__).parent / "results" / "fake_cuda.jsonl"
MODELS = ("llama2-7b", "llama3-8b")
TOKENS = (2048, 8192, 32768, 131072)
PLACEMENTS: dict[str, list[str]] = {"shipped": [], "q/v": ["adapter.every_layer=[]"]}
FEW, MORE = 2, 4
IN_A_LAYER = (FORWARD, RECOMPUTE, BACKWARD)
GIB = 2**30


def config_of(model: str, placement: str, changes: list[str]) -> RunConfig:
    """The shipped configuration for a model's shapes."""
    overrides = ["model.path=null", "model.init=random", "model.tokenizer=bytes"]
    overrides += [f"model.config={json.dumps(SHAPES[model])}", *PLACEMENTS[placement], *changes]
    return load_config(CONFIG, overrides, world_size=1, device_type="cuda", check_files=False)


def peak_of_all_layers(few: Traced, more: Traced, num_layers: int) -> dict[str, int]:
    """Peak bytes by kind at full depth."""
    added = {kind: more.bytes_by_kind[kind] - few.bytes_by_kind[kind] for kind in few.bytes_by_kind}
    times = (num_layers - FEW) // (MORE - FEW)
    return {kind: few.bytes_by_kind[kind] + added[kind] * times for kind in added}


def row_of(model: str, placement: str, tokens: int, changes: list[str]) -> dict[str, Any]:
    """What is traced of one case."""
    config = config_of(model, placement, changes)
    few, more, two = (
        trace_step(config, num_layers=number, tokens=tokens, micro_batches=micro_batches)
        for number, micro_batches in ((FEW, 1), (MORE, 1), (FEW, 2))
    )
    # The first layers are adapted, those behind them are not.
    frozen = config_of(model, placement, [*changes, f"adapter.layers=0:{FEW}"])
    bare = trace_step(frozen, num_layers=MORE, tokens=tokens)
    num_layers = SHAPES[model]["num_hidden_layers"]
    by_kind = peak_of_all_layers(few, more, num_layers)
    launches = {phase: (more.launches[phase] - few.launches[phase]) / (MORE - FEW) for phase in IN_A_LAYER}
    of_frozen = {phase: (bare.launches[phase] - few.launches[phase]) / (MORE - FEW) for phase in IN_A_LAYER}
    num_adapted = 1 + len(config.adapter.listed)
    moved = {
        phase: (more.moved_bytes[phase] - few.moved_bytes[phase]) / (MORE - FEW) / tokens
        for phase in IN_A_LAYER
    }
    of_step, of_two = (sum(sync.times for sync in traced.syncs) for traced in (few, two))
    return {
        "benchmark": "fake_cuda",
        "model": model,
        "placement": placement,
        "changes": changes,
        "tokens": tokens,
        "num_layers": num_layers,
        "peak_bytes": sum(by_kind.values()),
        "peak_bytes_by_kind": by_kind,
        "launches_of_a_layer": launches,
        "launches_of_a_frozen_layer": of_frozen,
        "launches_of_an_adapted_linear": sum(launches[p] - of_frozen[p] for p in IN_A_LAYER) / num_adapted,
        "moved_bytes_of_a_layer_and_token": moved,
        "syncs_of_a_micro_batch": of_two - of_step,
        "syncs_of_a_step": 2 * of_step - of_two,
        "syncs": [sync._asdict() for sync in two.syncs],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--models", nargs="+", choices=list(SHAPES), default=MODELS, metavar="NAME")
    add("--tokens", type=int, nargs="+", default=TOKENS, metavar="N")
    add("--placements", nargs="+", choices=list(PLACEMENTS), default=list(PLACEMENTS), metavar="NAME")
    add("--set", nargs="+", default=[], metavar="A.B=VALUE", help="changes of the configuration")
    add("--out", type=path_argument, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    arguments = parser.parse_args()
    quiet_libraries()
    for model in arguments.models:
        for placement in arguments.placements:
            for tokens in arguments.tokens:
                row = row_of(model, placement, tokens, arguments.set)
                append_row(arguments.out, row)
                print(shown(row), flush=True)
    return 0


def shown(row: dict[str, Any]) -> str:
    """A row as a line."""
    kinds = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in row["peak_bytes_by_kind"].items() if size)
    layer, frozen = (sum(row[f"launches_of_a_{name}"].values()) for name in ("layer", "frozen_layer"))
    return (
        f"{row['model']} {row['placement']:7} {row['tokens']:7,} tokens: {row['peak_bytes'] / GIB:6.2f} GiB "
        f"({kinds}); launches {layer:.0f} a layer, {frozen:.0f} frozen, "
        f"{row['launches_of_an_adapted_linear']:.1f} an adapted linear; syncs "
        f"{row['syncs_of_a_micro_batch']} a micro-batch, {row['syncs_of_a_step']} a step"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
