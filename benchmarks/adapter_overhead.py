"""What an adapter costs over the frozen backbone: `python benchmarks/adapter_overhead.py --model smollm2`.

Five models share one backbone's tensors, attention, gradient checkpointing and loss, and are timed in turn:

    frozen     no adapter; gradients run back to the embeddings
    ssmlora    ours, q_proj and v_proj in turn
    lora       ours, q_proj and v_proj everywhere
    peft       PEFT's LoRA on q_proj and v_proj, its defaults, under autocast
    eager      the recurrence as its equations are written, q_proj and v_proj in turn

A step is forward, backward and the optimiser's update. Before anything is timed, outputs and gradients of
ssmlora and eager, and of lora and peft, are compared. Weights are random, shapes are real.
"""

from __future__ import annotations

import argparse
import copy
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

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.layers import SSMLoRALinear
from ssmlora_dist.distributed.cost_model import DecoderShape, bytes_per_weight
from ssmlora_dist.distributed.roofline import Ceilings, measured_ceilings, step_limit
from ssmlora_dist.models import load_config, load_model
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.ops import reference
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row

RESULTS = Path(__file__).parent / "results" / "adapter_overhead.jsonl"
RANK, ALPHA = 8, 16
# At which the bytes kept for the backward pass are counted: PEFT's default, and its users' habit.
DROPOUTS = (0.0, 0.1)
VARIANTS = ("frozen", "ssmlora", "lora", "peft", "eager")
# Of gradients in bfloat16 over a whole model: the adapters' products are rounded at other places.
GRADIENT_TOLERANCE = 0.05
LOSS_TOLERANCE = 5e-3


class EagerTimeModule(SSMLoRALinear):
    """The recurrence as `ops.reference` writes it, tensor by tensor."""

    def step(self, x_BSD: Tensor, h_prev_BSR: Tensor) -> tuple[Tensor, Tensor]:
        mask_BSR = None
        if self.training and self.dropout > 0:
            mask_BSR = nn.functional.dropout(torch.ones_like(h_prev_BSR, dtype=torch.float32), self.dropout)
        return reference.time_module(
            x_BSD,
            self.base_layer(x_BSD),
            h_prev_BSR,
            self.lora_A.weight,
            self.lora_B.weight,
            self.state_transition,
            self.state_input,
            scaling=self.scaling,
            normalization=self.normalization,
            carry=self.carry,
            detach_state=self.detach_state,
            dropout_mask_BSR=mask_BSR,
        )


class Variant:
    """One adapted model: its loss, what it trains, how its step goes.

    Args:
        name: one of `VARIANTS`.
        backbone: whose tensors it shares.
        dropout: of the adapters.
        checkpointing: recompute the layers.
    """

    def __init__(self, name: str, backbone: Any, dropout: float, checkpointing: bool) -> None:
        self.name = name
        model = _sharing_copy(backbone)
        self.autocast = name == "peft"
        if name == "frozen":
            # The embeddings' output is where gradients end.
            model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_())
        elif name == "peft":
            model = _with_peft(model, dropout)
        else:
            add_adapters(model, _adapter_config("lora" if name == "lora" else "ssmlora", dropout))
        if name == "eager":
            for module in model.modules():
                if isinstance(module, SSMLoRALinear):
                    module.__class__ = EagerTimeModule
        if checkpointing:
            checkpoint_layers(model)
        self.model = model
        self.loss = CausalLMLoss(model, chunk_size=1024).train()
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _set_equal(self.trained)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-6) if self.trained else None

    @property
    def num_adapted(self) -> int:
        """Linear layers with an adapter."""
        return sum("lora_A" in name for name in self.trained)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=self.autocast):
            loss: Tensor = self.loss(**batch)
        return loss / batch["labels"].numel()

    def step(self, batch: dict[str, Tensor]) -> None:
        self.forward(batch).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Loss, and gradients by a name that is the same in all models."""
        loss = self.forward(batch)
        loss.backward()
        found = {_plain_name(n): p.grad.clone() for n, p in self.trained.items() if p.grad is not None}
        for parameter in self.trained.values():
            parameter.grad = None
        return float(loss.detach()), found


def _adapter_config(method: str, dropout: float) -> AdapterConfig:
    return AdapterConfig(
        method=method,  # type: ignore[arg-type]
        rank=RANK,
        alpha=ALPHA,
        dropout=dropout,
        alternate=("q_proj", "v_proj") if method == "ssmlora" else (),
        every_layer=("q_proj", "v_proj") if method == "lora" else (),
    )


def _with_peft(model: Any, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).base_model.model


def _sharing_copy(backbone: Any) -> Any:
    """A model of its own modules, and of the backbone's tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*backbone.parameters(), *backbone.buffers()):
        memo[id(tensor)] = tensor
    for module in backbone.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            memo[id(state)] = state
    return copy.deepcopy(backbone, memo)


def _plain_name(name: str) -> str:
    return name.replace("base_model.model.", "").replace(".default", "")


def _set_equal(trained: dict[str, nn.Parameter]) -> None:
    """Values that follow from the name and the shape alone, so that models can be compared; none is zero."""
    for name, parameter in sorted(trained.items()):
        if parameter.dim() == 2 and "state_" not in name:
            seed = sum(map(ord, _plain_name(name)))
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                parameter.copy_(drawn / parameter.shape[1] ** 0.5 * (0.1 if "lora_B" in name else 1.0))


def check(variants: dict[str, Variant], batch: dict[str, Tensor]) -> None:
    """Compares the models that compute the same thing.

    Raises:
        AssertionError: they do not.
    """
    for ours, theirs in (("ssmlora", "eager"), ("lora", "peft")):
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


def count_operators(variant: Variant, batch: dict[str, Tensor]) -> int:
    """Operators of forward and backward; on CUDA kernels."""
    if batch["input_ids"].device.type == "cuda":
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


def saved_bytes(variant: Variant, batch: dict[str, Tensor]) -> int:
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
    backbone = load_model(
        init="random", config=config, quantization=arguments.quantization, device=device, seed=0
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (1, arguments.tokens), generator=generator).to(device)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(arguments.tokens, device=device).unsqueeze(0),
        "labels": torch.where(
            torch.arange(arguments.tokens, device=device) < arguments.tokens // 8 * 7, -100, ids
        ),
    }
    # Without checkpointing, where a layer's own appetite shows.
    without = {name: Variant(name, backbone, 0.0, False) for name in VARIANTS}
    check(without, batch)
    operators = {name: count_operators(variant, batch) for name, variant in without.items()}
    del without
    saved = {
        (name, dropout): saved_bytes(Variant(name, backbone, dropout, False), batch)
        for name in VARIANTS
        for dropout in DROPOUTS
    }
    variants = {
        name: Variant(name, backbone, arguments.dropout, arguments.checkpointing) for name in VARIANTS
    }
    seconds = _timed(variants, batch, arguments.repeats)
    peaks = {name: _peak_bytes(variant, batch) for name, variant in variants.items()}
    ceilings = Ceilings(*arguments.ceilings) if arguments.ceilings else measured_ceilings(device)
    limit = step_limit(
        DecoderShape.of(load_config(config=config)),
        ceilings,
        sequence_length=arguments.tokens,
        supervised_tokens=arguments.tokens - arguments.tokens // 8 * 7,
        checkpointing=arguments.checkpointing,
        bytes_per_linear_weight=None
        if arguments.quantization == "none"
        else bytes_per_weight(arguments.quantization, double_quantization=True, compute_dtype_bytes=2),
    )
    # Process time counts all threads, the ceilings what they do together.
    limit_seconds = limit.seconds * (1 if device.type == "cuda" else torch.get_num_threads())
    return [
        {
            "benchmark": "adapter_overhead",
            "model": arguments.model,
            "layers": config["num_hidden_layers"],
            "tokens": arguments.tokens,
            "quantization": arguments.quantization,
            "checkpointing": arguments.checkpointing,
            "dropout": arguments.dropout,
            "device": arguments.device,
            "threads": torch.get_num_threads(),
            "repeats": arguments.repeats,
            "peft_version": version("peft"),
            "variant": name,
            "num_adapted": variant.num_adapted,
            "num_trained": sum(p.numel() for p in variant.trained.values()),
            "step_seconds_median": statistics.median(seconds[name]),
            "step_seconds_min": min(seconds[name]),
            "over_frozen_median": statistics.median(seconds[name]) / statistics.median(seconds["frozen"]),
            "over_frozen_min": min(seconds[name]) / min(seconds["frozen"]),
            "operators_beyond_frozen": operators[name] - operators["frozen"],
            "operators_per_adapted": (operators[name] - operators["frozen"]) / max(1, variant.num_adapted),
            **{
                f"saved_bytes_beyond_frozen_dropout_{dropout:g}": saved[name, dropout]
                - saved["frozen", dropout]
                for dropout in DROPOUTS
            },
            "peak_bytes": peaks[name],
            "ceilings": asdict(ceilings),
            "of_roofline": limit_seconds / min(seconds[name]),
        }
        for name, variant in variants.items()
    ]


def _timed(variants: dict[str, Variant], batch: dict[str, Tensor], repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, in turn: process time on the CPU, events on CUDA."""
    clock = _cuda_seconds if batch["input_ids"].device.type == "cuda" else _process_seconds
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


def _peak_bytes(variant: Variant, batch: dict[str, Tensor]) -> int | None:
    """Most that a step holds: on the GPU with the shared backbone, on a CPU beyond what was resident before.

    None where the system does not tell.
    """
    gc.collect()
    if batch["input_ids"].device.type != "cuda":
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
    print(f"variant  adapted  min step   median  over frozen    operators{of_peft}  peak MiB  of roofline")
    for row in rows:
        keys = [f"saved_bytes_beyond_frozen_dropout_{dropout:g}" for dropout in DROPOUTS]
        shares = "".join(f"{row[key] / peft[key]:26.3f}" for key in keys)
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}"
        print(
            f"{row['variant']:8} {row['num_adapted']:7}"
            f" {row['step_seconds_min']:8.4f}s {row['step_seconds_median']:7.4f}s"
            f" {row['over_frozen_min']:6.3f} {row['over_frozen_median']:5.3f}"
            f" {row['operators_beyond_frozen']:6} {row['operators_per_adapted']:5.1f}"
            f"{shares}  {peak:>8} {row['of_roofline']:12.3f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SHAPES, default="smollm2")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to fit")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--quantization", choices=("nf4", "fp4", "int8", "none"), default="nf4")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
    quiet_libraries()
    rows = measure(arguments)
    show(rows)
    for row in rows:
        append_row(arguments.out, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
