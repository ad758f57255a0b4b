"""What each of two ranks reads and holds while a backbone is loaded: `python benchmarks/loading.py`.

SmolLM2-135M and a generated checkpoint of 1.5 billion parameters, in NF4, as two pipeline stages and under
ZeRO 3, over gloo on the CPU. Every load has processes of its own and finds nothing of the files in the page
cache. Two bounds for every rank: it reads at most 1.05 of its share of the checkpoint, half of it as a stage
and all of it under ZeRO 3; its memory rises by at most 1.2 times the sum of what it then holds and two of the
largest tensors. All that it holds is compared with a plain load of the same files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

# Read when torch is loaded: one thread each, and a rank that waits leaves the cores alone.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", CUDA_VISIBLE_DEVICES="")

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.distributed.context import DistributedContext, start_process_group, stop_process_group
from ssmlora_dist.distributed.ds_config import deepspeed_config
from ssmlora_dist.distributed.loading import swap_rows, zero3_partitioner
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_config, load_model
from ssmlora_dist.models.loading import build_skeleton
from ssmlora_dist.models.location import WEIGHTS_INDEX_FILE
from ssmlora_dist.models.safetensors_file import StoredTensor, stored_tensors
from ssmlora_dist.models.stage import StageLayers
from ssmlora_dist.quantization import QuantizedLinear
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).parent / "results" / "loading.jsonl"
NUM_RANKS = 2
SPLITS = {"stages": "two pipeline stages", "zero3": "ZeRO 3"}
READ_BOUND = 1.05  # of a rank's share of the checkpoint
MEMORY_BOUND = 1.2  # of what the rank holds at the end and two of the largest tensors
SHARD_BYTES = 10**9
GENERATED = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 7680,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
TINY = {**GENERATED, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Loaded:
    """What one rank read and held.

    Attributes:
        asked_bytes: of the tensors that it asked for.
        read_bytes: that the disk gave it.
        peak_bytes: largest memory while it loaded, beyond that before.
        held_bytes: of the tensors that it holds at the end.
        equal: whether all of these are what a plain load gives.
        seconds: that the load took.
    """

    asked_bytes: int
    read_bytes: int
    peak_bytes: int
    held_bytes: int
    equal: bool
    seconds: float


def measure(path: Path, split: str, out: Path) -> None:
    """One rank: loads its share of the model in `path`; rank 0 writes what all of them found to `out`."""
    quiet_libraries()
    context = start_process_group(600)
    try:
        found: list[Loaded | None] = [None] * context.world_size
        dist.all_gather_object(found, _measure(path, split, context))
        if context.is_main:
            out.write_text(json.dumps([asdict(loaded) for loaded in found if loaded]), encoding="utf-8")
    finally:
        stop_process_group()


def _measure(path: Path, split: str, context: DistributedContext) -> Loaded:
    settings = deepspeed_config(
        zero_stage=3, micro_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=None, num_trained=1
    )
    partition = zero3_partitioner(settings) if split == "zero3" else None
    # So that libraries that load at the first use are there.
    load_model(init="random", config=TINY, on_part=partition)
    sharing: dict[str, Any] = {"on_part": partition}
    if split == "stages":
        num_layers = load_config(str(path)).num_hidden_layers
        middle = num_layers // 2
        first, stop = (0, middle) if context.rank == 0 else (middle, num_layers)
        stage = StageLayers(first, stop, num_layers)
        sharing = {"stage": stage, "swap_rows": partial(swap_rows, NUM_RANKS - 1 - context.rank)}
    _forget_files(path)
    dist.barrier()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    memory_before, read_before, started = _memory_bytes("VmRSS"), _read_bytes(), time.perf_counter()
    with counted_reads() as asked:
        model = load_model(str(path), **sharing)
    seconds = time.perf_counter() - started
    peak, read = _memory_bytes("VmHWM") - memory_before, _read_bytes() - read_before
    held = held_tensors(model)
    return Loaded(
        asked_bytes=sum(asked),
        read_bytes=read,
        peak_bytes=peak,
        held_bytes=sum({t.data_ptr(): t.nbytes for t in held.values()}.values()),
        equal=_equal(held, held_tensors(load_model(str(path))), context),
        seconds=seconds,
    )


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a rank holds of a frozen model, by name: parameters or their shards, quantisation states."""
    held = dict(model.named_buffers())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held[name] = getattr(parameter, "ds_tensor", parameter).detach()
    for path, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            state: Any = layer.quant_state
            for part, owner in (("quant_state", state), ("state2", state.state2)):
                tensors = {key: value for key, value in vars(owner).items() if isinstance(value, Tensor)}
                held.update({f"{path}.{part}.{key}": value for key, value in tensors.items()})
    return held


def _equal(held: dict[str, Tensor], plain: dict[str, Tensor], context: DistributedContext) -> bool:
    """Whether every tensor held, or its shard, is that of the plain model, bit for bit."""

    def same(tensor: Tensor, whole: Tensor) -> bool:
        if tensor.shape != whole.shape:
            whole = whole.flatten()[context.rank * len(tensor) :][: len(tensor)]
            tensor = tensor[: len(whole)]
        # As bytes: packed weights are no numbers, and some are not even equal to themselves.
        return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, whole)))

    different = [name for name, tensor in held.items() if not same(tensor, plain[name])]
    if different:
        print(
            f"rank {context.rank}: {len(different)} tensors are not a plain load's, {different[0]} first",
            file=sys.stderr,
        )
    return not different


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Bytes of every tensor that is read from a checkpoint, in a list that grows."""
    sizes: list[int] = []
    read = StoredTensor.read

    def counted(self: StoredTensor, rows: range | None = None) -> Tensor:
        tensor = read(self, rows)
        sizes.append(tensor.nbytes)
        return tensor

    with mock.patch.object(StoredTensor, "read", counted):
        yield sizes


def _forget_files(directory: Path) -> None:
    """Drops the weights from the page cache."""
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def generate_checkpoint(directory: Path, config: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a bfloat16 model of random weights in shards, one tensor in memory at a time."""
    from transformers import AutoConfig

    model_config = AutoConfig.for_model(**config)
    skeleton = build_skeleton(model_config, torch.bfloat16, "sdpa", torch.device("cpu"))
    shards: list[dict[str, torch.Size]] = [{}]
    for name, parameter in sorted(skeleton.named_parameters()):
        if shards[-1] and sum(2 * shape.numel() for shape in shards[-1].values()) >= shard_bytes:
            shards.append({})
        shards[-1][name] = parameter.shape
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for index, shapes in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shapes, file))
        _write_shard(directory / file, shapes, generator)
    index_content = {"metadata": {}, "weight_map": weight_map}
    (directory / WEIGHTS_INDEX_FILE).write_text(json.dumps(index_content), encoding="utf-8")
    model_config.save_pretrained(directory)


def _write_shard(file: Path, shapes: dict[str, torch.Size], generator: torch.Generator) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            drawn = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            stream.write(drawn.view(-1).view(torch.uint8).numpy().data)


def result_row(model: str, path: Path, split: str, loaded: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one load, with its bounds."""
    stored = [t for file in path.glob("*.safetensors") for t in stored_tensors(file).values()]
    checkpoint, largest = sum(t.num_bytes for t in stored), max(t.num_bytes for t in stored)
    share = checkpoint / NUM_RANKS if split == "stages" else checkpoint
    of_read_bound = [max(rank["read_bytes"], rank["asked_bytes"]) / (READ_BOUND * share) for rank in loaded]
    of_memory_bound = [
        rank["peak_bytes"] / (MEMORY_BOUND * (rank["held_bytes"] + 2 * largest)) for rank in loaded
    ]
    return {
        "benchmark": "loading",
        "model": model,
        "quantization": "nf4",
        "split": SPLITS[split],
        "checkpoint_bytes": checkpoint,
        "largest_tensor_bytes": largest,
        **{key: [rank[key] for rank in loaded] for key in loaded[0]},
        "of_read_bound": of_read_bound,
        "of_memory_bound": of_memory_bound,
        "bounds_met": max(of_read_bound + of_memory_bound) <= 1,
    }


def _show(row: dict[str, Any]) -> None:
    for rank in range(NUM_RANKS):
        mb = {key: row[key][rank] / 1e6 for key in ("asked_bytes", "read_bytes", "peak_bytes", "held_bytes")}
        of_read, of_memory = row["of_read_bound"][rank], row["of_memory_bound"][rank]
        print(
            f"{row['model']:14} {row['split']:20} {rank:4} {mb['asked_bytes']:8.1f} {mb['read_bytes']:8.1f}"
            f" {of_read:9.3f} {mb['held_bytes']:8.1f} {mb['peak_bytes']:8.1f} {of_memory:9.3f}"
            f" {row['seconds'][rank]:8.1f}{'' if max(of_read, of_memory) <= 1 else '  MISSED'}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Bytes read and memory taken while a backbone is loaded.")
    parser.add_argument(
        "--model", type=Path, default=SMOLLM2, help="made by launch/prepare_smollm2.py (default: %(default)s)"
    )
    parser.add_argument(
        "--work-dir", type=Path, help="for the generated checkpoint of 3 GB (default: a temporary directory)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="rows are added here (default: %(default)s)"
    )
    parser.add_argument("--split", choices=SPLITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.model, arguments.split, arguments.out)
        return 0
    if not (arguments.model / "config.json").is_file():
        raise ModelError(
            f"{arguments.model}: holds no model; make it with launch/prepare_smollm2.py, or name one: --model"
        )
    if arguments.work_dir is not None:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    print(
        f"{'model':14} {'split':20} rank asked MB  read MB  of bound  held MB  peak MB  of bound  seconds",
        flush=True,
    )
    rows = []
    with tempfile.TemporaryDirectory(prefix="loading.", dir=arguments.work_dir) as directory:
        generated = Path(directory) / "generated"
        generated.mkdir()
        generate_checkpoint(generated, GENERATED)
        for model, path in (("SmolLM2-135M", arguments.model), ("generated 1.5B", generated)):
            for split in SPLITS:
                rows.append(result_row(model, path, split, _load(path, split, Path(directory))))
                _show(rows[-1])
    for row in rows:
        append_row(arguments.out, row)
    return 0 if all(row["bounds_met"] for row in rows) else 1


def _load(path: Path, split: str, directory: Path) -> list[dict[str, Any]]:
    """What the ranks find, which are processes of this script."""
    out = directory / "found.json"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, f"--model={path}", f"--split={split}", f"--out={out}"]
    shared = {"WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(NUM_RANKS)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise RuntimeError(f"the ranks ended with exit codes {codes}")
    loaded: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    if not all(rank["equal"] for rank in loaded):
        raise RuntimeError("what was loaded is not what a plain load gives")
    return loaded


if __name__ == "__main__":
    sys.exit(run_command(main))
