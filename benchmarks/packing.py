"""Padded against packed rows of a configuration's own data, in one process.

    python benchmarks/packing.py --config configs/llama_ssmlora.json --name boolq --set data.max_length=2048
    python benchmarks/packing.py --config configs/quickstart.json --name chat --chat 400

Both train samples of one data set with one model: rows of one sample, so many a micro-batch and padded to
the longest, and packed rows of up to `data.max_length` tokens, as many as make up as many tokens. They are
timed in turn, a forward and a backward pass each; the rates are those of the supervised tokens that went
through.
`--chat` makes conversations of 1 to 6 turns, whose texts have log-normal lengths (median 25 words, a tenth
beyond 90), so that neither many short ones nor few long ones are all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The benchmarks lie beside the package's scripts.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from ssmlora_dist.batches import Batch, count
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.build import build_data, build_model, build_tokenizer, check_model
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.data import BatchShape, Dataset, GlobalBatches
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row
from ssmlora_dist.training.memory import spare_memory

RESULTS = Path(__file__).parent / "results" / "packing.jsonl"


@dataclass
class Measured:
    """One way to make rows.

    Attributes:
        batches: its micro-batches.
        rates: supervised tokens a second of each round.
    """

    batches: list[Batch]
    rates: list[float] = field(default_factory=list)


def write_chat(path: Path, number: int) -> None:
    """So many conversations of random words."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstv" for b in "aeiou"]

    def text() -> str:
        words = max(1, round(rng.lognormvariate(3.2, 1.0)))
        return " ".join("".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(words))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            roles = ("user", "assistant") * rng.randint(1, 6)
            json.dump({"messages": [{"role": role, "content": text()} for role in roles]}, file)
            file.write("\n")


def micro_batches(data: Dataset, rows: int, number: int, row_tokens: int | None, pad: int) -> list[Batch]:
    """The first ones of an epoch."""
    batches = GlobalBatches(data, BatchShape(rows, rows, 0, 1, pad), 0, row_tokens)
    return [batch for step in range(number) for batch in batches.micro_batches(step)]


def seconds_of(loss: CausalLMLoss, batch: Batch, device: torch.device) -> float:
    """Of a forward and a backward pass."""
    _wait(device)
    began = time.perf_counter()
    loss(batch.to(device)).backward()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what packing gains on a configuration's data.")
    add = parser.add_argument
    add("--config", type=path_argument, required=True, metavar="FILE", help="of a run")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides", help="changes of it")
    add("--name", required=True, help="of the data, in the row")
    add("--chat", type=int, metavar="N", help="train on so many generated conversations in place of its data")
    add("--micro-batch-size", type=int, default=8, metavar="N", help="padded rows (default: %(default)s)")
    add("--batches", type=int, default=4, metavar="N", help="of a round (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="(default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--out", type=path_argument, default=RESULTS, metavar="FILE", help="(default: %(default)s)")
    arguments = parser.parse_args()
    quiet_libraries()
    device = torch.device(arguments.device)
    dtype = f"model.compute_dtype={machine_dtype(device.type)}"
    given = [dtype, "data.validation=null", "evaluation.every_steps=null", *arguments.overrides]
    with tempfile.TemporaryDirectory() as directory:
        if arguments.chat:
            path = Path(directory) / "chat.jsonl"
            write_chat(path, arguments.chat)
            given.append(f'data.train={{"format":"chat","path":"{path}"}}')
        given += ["data.packing=true", "data.train.streaming=false"]
        config = load_config(arguments.config, given, device_type=device.type)
        check_model(config, device.type)
        tokenizer = build_tokenizer(config.model, print)
        data, _ = build_data(config, tokenizer, print)
    assert isinstance(data, Dataset), "not streamed"
    model = build_model(config, device)
    spare_memory(config, model)
    loss = CausalLMLoss(model, config.training.loss_chunk_size).train()
    rows, number, pad = arguments.micro_batch_size, arguments.batches, tokenizer.pad_token_id
    padded = micro_batches(data, rows, number, None, pad)
    # As many tokens a micro-batch: what is done once for each, such as dequantising, is done as often.
    packed_rows = max(1, round(count(padded)[1] / number / config.data.max_length))
    ways = {
        "padded": Measured(padded),
        "packed": Measured(micro_batches(data, packed_rows, number, config.data.max_length, pad)),
    }
    for measured in ways.values():
        seconds_of(loss, measured.batches[0], device)
    for _ in range(arguments.rounds):
        for measured in ways.values():
            seconds = sum(seconds_of(loss, batch, device) for batch in measured.batches)
            measured.rates.append(sum(batch.num_targets for batch in measured.batches) / seconds)
    found: dict[str, Any] = {}
    for name, measured in ways.items():
        num_targets, num_tokens, num_padding = count(measured.batches)
        found[name] = {
            "target_tokens_per_second": statistics.median(measured.rates),
            "padding_share": num_padding / num_tokens,
            "num_tokens": num_tokens,
            "num_target_tokens": num_targets,
        }
    gain = found["packed"]["target_tokens_per_second"] / found["padded"]["target_tokens_per_second"]
    row = {
        "data": arguments.name,
        "device": device.type,
        "compute_dtype": config.model.compute_dtype,
        "max_length": config.data.max_length,
        "padded_rows": rows,
        "packed_rows": packed_rows,
        "rounds": arguments.rounds,
        **found,
        "gain": gain,
    }
    append_row(arguments.out, row)
    for name, numbers in found.items():
        print(
            f"{name}: {numbers['target_tokens_per_second']:.1f} target tokens/s, "
            f"{100 * numbers['padding_share']:.1f}% padding"
        )
    print(f"packed over padded: {gain:.2f}")


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
