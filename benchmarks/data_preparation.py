"""What preparing many short records costs: `python benchmarks/data_preparation.py`.

A file of generated questions, each answered by a few words, is made the training data of a run by 1 and by 2
ranks over gloo on the CPU, at a first start, when nothing is prepared, and at a second one. Every start has
processes of its own. For each rank: seconds, and seconds of the CPU, from the start of reading to the first
batch; the peak of its memory beyond that before; what of it is its own at the end (pages of a mapped file are
shared by all ranks, and given back where memory is short); and the milliseconds of a batch of 32. The digest
of the contents must be the same in every row.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Read when torch is loaded: one thread each, and a rank that waits leaves the cores alone.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", CUDA_VISIBLE_DEVICES="")

from ssmlora_dist import prose
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.tracking.rows import append_row

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "data_preparation.jsonl"
STARTS = ("first", "second")
NUM_BATCHES = 200
BATCH_SIZE = 32
VOCABULARY = 8192


def measure(work: Path, num_ranks: int, out: Path) -> None:
    """One rank: prepares the data and takes batches; rank 0 writes what all of them found to `out`."""
    from ssmlora_dist.distributed.context import start_process_group, stop_process_group
    from ssmlora_dist.models import load_tokenizer
    from ssmlora_dist.tracking.quiet import quiet_libraries
    from ssmlora_dist.training.data import RunData
    from ssmlora_dist.training.resume_point import ResumePoint
    from ssmlora_dist.training.topology import parallel_dims_of

    quiet_libraries()
    train = {"format": "instruction", "path": str(work / "records.jsonl")}
    overrides = [
        f"data.train={json.dumps(train)}",
        "data.validation=null",
        "evaluation.every_steps=null",
        f"model.tokenizer={work / 'tokenizer'}",
        f"training.global_batch_size={BATCH_SIZE * num_ranks}",
        f"training.micro_batch_size={BATCH_SIZE}",
    ]
    config = load_config(ROOT / "configs" / "debug_tiny.json", overrides, device_type="cpu")
    tokenizer = load_tokenizer(str(work / "tokenizer"))
    context = start_process_group(3600)
    try:
        dims = parallel_dims_of(config, context)
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = {field: _memory_bytes(field) for field in ("VmRSS", "RssAnon")}
        started, cpu_before = time.perf_counter(), time.process_time()
        data = RunData(config, tokenizer, context, dims, ResumePoint(), print)
        data.micro_batches(0)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_before
        begun = time.perf_counter()
        for step in range(1, NUM_BATCHES + 1):
            data.micro_batches(step)
        found = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": _memory_bytes("VmHWM") - before["VmRSS"],
            "own_bytes": _memory_bytes("RssAnon") - before["RssAnon"],
            "batch_milliseconds": (time.perf_counter() - begun) / NUM_BATCHES * 1e3,
            "sha256": data.contents["train"]["sha256"],
        }
        of_ranks = context.gather(found)
        if context.is_main:
            out.write_text(json.dumps(of_ranks), encoding="utf-8")
    finally:
        stop_process_group()


def _memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def write_records(path: Path, number: int) -> None:
    """Questions of 10 to 40 words with answers of 1 to 8, always the same ones."""
    drawn, words = random.Random(0), prose.words()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            question, answer = (
                " ".join(drawn.choices(words, k=drawn.randint(*k))) for k in ((10, 40), (1, 8))
            )
            file.write(json.dumps({"instruction": question, "output": answer}) + "\n")


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of English words, of the Rust kind that models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(prose.sentences(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(
        directory
    )


def _start(work: Path, num_ranks: int) -> list[dict[str, Any]]:
    """What the ranks find, which are processes of this script."""
    out = work / "found.json"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, __file__, f"--work-dir={work}", f"--ranks={num_ranks}", f"--out={out}"]
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared["HF_DATASETS_CACHE"] = str(work / f"cache-{num_ranks}")
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_ranks)
    ]
    codes = [process.wait() for process in ranks]
    if any(codes):
        raise SystemExit("a rank failed; its message is above")
    found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Time and memory of preparing many short records.")
    add = parser.add_argument
    add("--records", type=int, default=1_000_000, metavar="N", help="(default: %(default)s)")
    add("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="(default: %(default)s)")
    add("--work-dir", type=Path, help="for records and cache (default: a temporary directory)")
    add("--out", type=Path, default=RESULTS, help="rows are added here (default: %(default)s)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.work_dir, arguments.ranks[0], arguments.out)
        return 0
    if arguments.work_dir is not None:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    print("ranks start  rank  seconds  CPU s  peak MB   own MB  ms a batch", flush=True)
    digests = set()
    with tempfile.TemporaryDirectory(prefix="preparation.", dir=arguments.work_dir) as directory:
        work = Path(directory)
        write_records(work / "records.jsonl", arguments.records)
        write_tokenizer(work / "tokenizer")
        for num_ranks in arguments.ranks:
            for start in STARTS:
                found = _start(work, num_ranks)
                digests |= {rank.pop("sha256") for rank in found}
                for rank, values in enumerate(found):
                    print(
                        f"{num_ranks:5} {start:6} {rank:4} {values['seconds']:8.1f}"
                        f" {values['cpu_seconds']:6.1f}"
                        f" {values['peak_bytes'] / 1e6:8.1f} {values['own_bytes'] / 1e6:8.1f}"
                        f" {values['batch_milliseconds']:11.2f}",
                        flush=True,
                    )
                row = {"benchmark": "data_preparation", "num_records": arguments.records}
                row |= {"records_bytes": (work / "records.jsonl").stat().st_size}
                row |= {"num_ranks": num_ranks, "start": start}
                append_row(arguments.out, row | {key: [rank[key] for rank in found] for key in found[0]})
    if len(digests) != 1:
        print("the ranks and starts have not all read the same", file=sys.stderr)
    return int(len(digests) != 1)


if __name__ == "__main__":
    sys.exit(run_command(main, alone="RANK" not in os.environ))
