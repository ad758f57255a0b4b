"""What an adapter costs over the frozen backbone: `python benchmarks/adapter_overhead.py --model smollm2`.

These models share one backbone's tensors, attention, gradient checkpointing and loss, and are timed in turn:

    frozen          no adapter; gradients run back to the embeddings
    ssmlora         ours, q_proj and v_proj in turn
    lora            ours, q_proj and v_proj everywhere
    peft            PEFT's LoRA on q_proj and v_proj, its defaults, under autocast
    eager           the recurrence as its equations are written, q_proj and v_proj in turn
    redequantizing  ssmlora with each recomputed weight dequantised once more for its backward pass

A step is forward, backward and the optimiser's update. Before anything is timed, outputs and gradients of
ssmlora and eager, of lora and peft, and of ssmlora and redequantizing are compared. Weights are random,
shapes are real.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Read when torch is loaded: threads that wait leave the cores alone.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Its variants lie beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.adapter_variants import VARIANTS, Variant
from ssmlora_dist.batches import IGNORED_LABEL, Batch
from ssmlora_dist.devices import device_type
from ssmlora_dist.distributed.cost_model import bytes_per_weight
from ssmlora_dist.distributed.roofline import Ceilings, measured_ceilings, step_limit
from ssmlora_dist.models import empty_model, load_config, load_model, structure_of
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row

RESULTS = Path(__file__).parent / "results" / "adapter_overhead.jsonl"
# At which the bytes kept for the backward pass are counted: PEFT's default, and its users' habit.
DROPOUTS = (0.0, 0.1)
SAVED_BYTES = "saved_bytes_beyond_frozen_dropout_{:g}"
# Of gradients in 16 bits over a whole model: the adapters' products are rounded at other places.
GRADIENT_TOLERANCE = 0.05
LOSS_TOLERANCE = 5e-3


def check(variants: dict[str, Variant], batch: Batch) -> None:
    """Compares the models that compute the same thing.

    Raises:
        AssertionError: they do not.
    """
    for ours, theirs in (("ssmlora", "eager"), ("lora", "peft"), ("ssmlora", "redequantizing")):
        if ours not in variants or theirs not in variants:
            continue
        loss, gradients = variants[ours].gradients(batch)
        expected_loss, expected = variants[theirs].gradients(batch)
        assert abs(loss - expected_loss) <= LOSS_TOLERANCE * abs(expected_loss), (ours, loss, expected_loss)
        assert gradients.keys() == expected.keys(), f"{ours} and {theirs} train other parameters"
        names = sorted(gradients)
        a, b = (torch.cat([of[n].double().flatten() for n in names]) for of in (gradients, expected))
        error = float((a - b).norm() / b.norm())
        assert error <= GRADIENT_TOLERANCE, (
            f"gradients of {ours} differ from those of {theirs} by {error:.3f}"
        )
        print(
            f"{ours} equals {theirs}: loss {loss:.4f} and {expected_loss:.4f}, gradients within {error:.4f}"
        )


class _Counter(TorchDispatchMode):
    """Counts operators that compute; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func not in _FREE
        return func(*args, **(kwargs or {}))


_FREE = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.alias.default}


def count_operators(variant: Variant, batch: Batch) -> int:
    """Operators of forward and backward; on CUDA kernels."""
    if batch.targets.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            variant.forward(batch).backward()
            torch.cuda.synchronize()
        count = sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0)
    else:
        with _Counter() as counter:
            variant.forward(batch).backward()
        count = counter.count
    variant.gradients(batch)
    return count


def saved_bytes(variant: Variant, batch: Batch) -> int:
    """Distinct bytes that the graph of a forward pass keeps for the backward pass, parameters aside."""
    held = {p.untyped_storage().data_ptr() for p in (*variant.model.parameters(), *variant.model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
            # Else another tensor might take its place, and its address.
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = variant.forward(batch)
    total = sum(kept.values())
    del loss
    alive.clear()
    return total


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every variant."""
    device = torch.device(arguments.device)
    config = {**SHAPES[arguments.model]}
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    dtype = getattr(torch, machine_dtype(device.type))
    backbone = load_model(
        init="random",
        config=config,
        quantization=arguments.quantization,
        compute_dtype=dtype,
        device=device,
        seed=0,
    )
    batch = _batch(config["vocab_size"], arguments.tokens, device)
    names = [name for name in VARIANTS if name != "redequantizing"]
    # Without checkpointing, where a layer's own appetite shows.
    costs = _costs_of_keeping_all(names, backbone, batch)
    if arguments.checkpointing and arguments.quantization != "none":
        names.append("redequantizing")
        pair = ("ssmlora", "redequantizing")
        check({name: Variant(name, backbone, 0.0, True) for name in pair}, batch)
    variants = {name: Variant(name, backbone, arguments.dropout, arguments.checkpointing) for name in names}
    seconds = _timed(variants, batch, arguments.repeats)
    ceilings = Ceilings(*arguments.ceilings) if arguments.ceilings else measured_ceilings(device, dtype)
    limit_seconds = _limit_seconds(config, ceilings, arguments, dtype.itemsize)
    settings = ("model", "tokens", "quantization", "checkpointing", "dropout", "device", "repeats")
    return [
        {
            "benchmark": "adapter_overhead",
            **{key: getattr(arguments, key) for key in settings},
            "layers": config["num_hidden_layers"],
            "compute_dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "peft_version": version("peft"),
            "variant": name,
            "num_adapted": variant.num_adapted,
            "num_trained": sum(p.numel() for p in variant.trained.values()),
            "step_seconds_median": statistics.median(seconds[name]),
            "step_seconds_min": min(seconds[name]),
            "over_frozen_median": statistics.median(seconds[name]) / statistics.median(seconds["frozen"]),
            "over_frozen_min": min(seconds[name]) / min(seconds["frozen"]),
            **costs.get(name, dict.fromkeys(costs["frozen"])),
            "peak_bytes": _peak_bytes(variant, batch),
            "ceilings": asdict(ceilings),
            "of_roofline": limit_seconds / min(seconds[name]),
        }
        for name, variant in variants.items()
    ]


def _batch(vocab_size: int, num_tokens: int, device: torch.device) -> Batch:
    """One row of random tokens, of which the last eighth is supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (1, num_tokens), generator=generator)
    positions = torch.arange(num_tokens).unsqueeze(0)
    labels = torch.where(positions < num_tokens // 8 * 7, IGNORED_LABEL, ids)
    return Batch.of(labels, input_ids=ids, position_ids=positions).to(device)


def _costs_of_keeping_all(names: list[str], backbone: Any, batch: Batch) -> dict[str, dict[str, float]]:
    """Operators and bytes beyond the frozen model's, of each variant without gradient checkpointing."""
    variants = {name: Variant(name, backbone, 0.0, False) for name in names}
    check(variants, batch)
    operators = {name: count_operators(variant, batch) for name, variant in variants.items()}
    costs: dict[str, dict[str, float]] = {}
    for name, variant in variants.items():
        added = operators[name] - operators["frozen"]
        costs[name] = {
            "operators_beyond_frozen": added,
            "operators_per_adapted": added / max(1, variant.num_adapted),
        }
    for dropout in DROPOUTS:
        saved = {name: saved_bytes(Variant(name, backbone, dropout, False), batch) for name in names}
        for name in names:
            costs[name][SAVED_BYTES.format(dropout)] = saved[name] - saved["frozen"]
    return costs


def _limit_seconds(
    config: dict[str, Any], ceilings: Ceilings, arguments: argparse.Namespace, compute_dtype_bytes: int
) -> float:
    """The shortest step that the ceilings allow the frozen model, in the clock of the measured ones."""
    quantization = arguments.quantization
    limit = step_limit(
        structure_of(empty_model(load_config(config=config))).shape,
        ceilings,
        sequence_length=arguments.tokens,
        supervised_tokens=arguments.tokens - arguments.tokens // 8 * 7,
        checkpointing=arguments.checkpointing,
        bytes_per_linear_weight=None
        if quantization == "none"
        else bytes_per_weight(
            quantization, double_quantization=True, compute_dtype_bytes=compute_dtype_bytes
        ),
        compute_dtype_bytes=compute_dtype_bytes,
    )
    # Process time counts all threads, the ceilings what they do together.
    return limit.seconds * (torch.get_num_threads() if arguments.device == "cpu" else 1)


def _timed(variants: dict[str, Variant], batch: Batch, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, in turn: process time on the CPU, events on CUDA."""
    clock = _cuda_seconds if batch.targets.device.type == "cuda" else _process_seconds
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for repeat in range(repeats + 2):
        # Every variant follows every other one.
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            gc.collect()
            taken = clock(lambda name=name: variants[name].step(batch))  # type: ignore[misc]
            if repeat >= 2:
                seconds[name].append(taken)
    return seconds


def _process_seconds(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def _cuda_seconds(step: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _peak_bytes(variant: Variant, batch: Batch) -> int | None:
    """Most that a step holds: on the GPU with the shared backbone, on a CPU beyond what was resident before.

    None where the system does not tell.
    """
    gc.collect()
    if batch.targets.device.type != "cuda":
        if not _CLEAR_REFS.exists():
            return None
        variant.step(batch)
        ctypes.CDLL(None).malloc_trim(0)
        before = _resident_bytes("VmRSS")
        _CLEAR_REFS.write_text("5")
        variant.step(batch)
        return _resident_bytes("VmHWM") - before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    variant.step(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


# Linux: writing 5 sets the greatest resident size, VmHWM, back to the present one.
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table: a line for each variant."""
    peft = next(row for row in rows if row["variant"] == "peft")
    of_peft = "".join(f"  saved/peft's, dropout {dropout:g}" for dropout in DROPOUTS)
    print(
        f"variant         adapted  min step   median  over frozen    operators{of_peft}"
        "  peak MiB  of roofline"
    )
    for row in rows:
        keys = [SAVED_BYTES.format(dropout) for dropout in DROPOUTS]
        shares = "".join("" if row[key] is None else f"{row[key] / peft[key]:26.3f}" for key in keys)
        operators = ""
        if row["operators_beyond_frozen"] is not None:
            operators = f"{row['operators_beyond_frozen']:6} {row['operators_per_adapted']:5.1f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        print(
            f"{row['variant']:15} {row['num_adapted']:7}"
            f" {row['step_seconds_min']:8.4f}s {row['step_seconds_median']:7.4f}s"
            f" {row['over_frozen_min']:6.3f} {row['over_frozen_median']:5.3f}"
            f" {operators:12}{shares or ' ' * 26 * len(keys)}  {peak:>8} {row['of_roofline']:12.3f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to fit")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--quantization", choices=("nf4", "fp4", "int8", "none"), default="nf4")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", help="by default a GPU, where there is one")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--ceilings",
        type=float,
        nargs=3,
        metavar=("TFLOPS", "TFLOPS", "GB_PER_S"),
        help="of products, of attention, of memory (default: measured): rows hold a step's fraction of them",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="rows are added here (default: %(default)s)"
    )
    arguments = parser.parse_args()
    arguments.device = arguments.device or device_type()
    quiet_libraries()
    rows = measure(arguments)
    show(rows)
    for row in rows:
        append_row(arguments.out, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
