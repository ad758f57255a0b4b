"""Efficiency of two pipeline stages against one: `python benchmarks/pipeline_efficiency.py`.

Two ranks over gloo on the CPU, one thread each, train a randomly initialised Llama in NF4, with m
micro-batches a step. One stage with gradient checkpointing is the reference; against it, by 1F1B, stages that
recompute each layer on its gradient, and stages that recompute while they wait. All of them are first checked
to train the same adapter, bit for bit, and then timed in turn. The bound of the plain schedule is
m / (m + p - 1). The simulated step follows from the passes' own times, without what they wait for.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Read when torch is loaded: one thread each, and a rank that waits leaves the cores alone.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", CUDA_VISIBLE_DEVICES="")

import torch
import torch.distributed as dist
from torch import Tensor

from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.batches import Batch
from ssmlora_dist.config.build import build_model
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import BatchShape, Dataset, DatasetReport, Example, GlobalBatches
from ssmlora_dist.distributed.context import DistributedContext, start_process_group, stop_process_group
from ssmlora_dist.distributed.engine import clip_gradients
from ssmlora_dist.distributed.schedule import Recompute, StageTimes, simulate
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row
from ssmlora_dist.training.optimizer import build_optimizer
from ssmlora_dist.training.topology import BuiltEngine, StagePlan, build_engine, parallel_dims_of, plan_stages

RESULTS = Path(__file__).parent / "results" / "pipeline_efficiency.jsonl"
STAGES = 2
MICRO_BATCHES = (4, 8)
# Of m / (m + p - 1), what must be reached.
FLOOR = {"on_gradient": 0.93, "while_waiting": 1.15}
SIMULATOR_TOLERANCE = 0.05
LEARNING_RATE = 1e-3
DTYPE = machine_dtype("cpu")
MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Timed:
    """Seconds of a step, all repeats; memory that the step took at most, by rank."""

    seconds: list[float]
    peak_memory_mib: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def run_config(ahead: str | int) -> RunConfig:
    """Of a run that needs no files."""
    sections: dict[str, Any] = {
        "run": {"name": "pipeline_efficiency"},
        "model": {"init": "random", "config": MODEL, "tokenizer": "bytes", "compute_dtype": DTYPE},
        "data": {"train": {"format": "task", "task": {"task": "passkey"}}},
        "training": {"max_steps": 1, "global_batch_size": max(MICRO_BATCHES), "learning_rate": LEARNING_RATE},
        "parallel": {"pipeline_stages": STAGES, "recompute_ahead": ahead},
    }
    return RunConfig.model_validate(sections)


def random_rows(number: int, length: int, num_targets: int) -> Dataset:
    """Rows of random tokens, the last ones of each supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, MODEL["vocab_size"], (number, length), generator=generator)  # type: ignore[call-overload]
    is_target = [position >= length - num_targets for position in range(length)]
    rows = [Example.from_tokens(row, is_target, None, {"length": length}) for row in ids.tolist()]
    return Dataset(rows, DatasetReport(number, number))


class SingleStage:
    """The whole model on this rank, trained as simply as can be."""

    def __init__(self, config: RunConfig, context: DistributedContext) -> None:
        model = build_model(config, context.device)
        checkpoint_layers(model)
        self.loss = CausalLMLoss(model, config.training.loss_chunk_size).train()
        self.parameters = dict(sorted(adapter_parameters(model).items()))
        training = config.training
        self.optimizer = build_optimizer(
            training.optimizer,
            self.parameters,
            learning_rate=LEARNING_RATE,
            betas=training.betas,
            epsilon=training.epsilon,
            weight_decay=training.weight_decay,
        )
        self.max_grad_norm = training.max_grad_norm

    def step(self, batches: list[Batch]) -> None:
        num_targets = sum(batch.num_targets for batch in batches)
        for batch in batches:
            (self.loss(batch) / num_targets).backward()
        clip_gradients(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def adapter(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def measure(arguments: argparse.Namespace) -> int:
    """One rank of the benchmark; the exit code says whether the floors were reached."""
    quiet_libraries()
    context = start_process_group(600)
    try:
        return _measure(arguments, context)
    finally:
        stop_process_group()


def _measure(arguments: argparse.Namespace, context: DistributedContext) -> int:
    data = random_rows(max(MICRO_BATCHES), arguments.tokens, arguments.tokens // 8)
    configs: dict[Recompute, RunConfig] = {"on_gradient": run_config(0), "while_waiting": run_config("auto")}
    single = SingleStage(configs["on_gradient"], context)
    dims = parallel_dims_of(configs["on_gradient"], context)
    plans = {name: plan_stages(config, data, dims) for name, config in configs.items()}
    built = {name: build_engine(configs[name], context, dims, plans[name]) for name in configs}
    batches = {m: GlobalBatches(data, BatchShape(m, 1, 0, 1, 0), 0).micro_batches(0) for m in MICRO_BATCHES}
    _check_equal(single, built, batches[MICRO_BATCHES[-1]], context)
    clocks = {name: PassClock(engine) for name, engine in built.items()}

    step: dict[str, Callable[[list[Batch]], object]] = {
        "one stage": single.step,
        **{
            name: partial(engine.engine.train_step, learning_rate=LEARNING_RATE)
            for name, engine in built.items()
        },
    }
    timed = {(name, m): Timed([], []) for m in MICRO_BATCHES for name in step}
    for _ in range(arguments.repeats):
        for name, m in timed:
            timed[name, m].seconds.append(_seconds(step[name], batches[m], context))
    times = {name: clock.stage_times(arguments.tokens, context) for name, clock in clocks.items()}
    for name, m in timed:
        timed[name, m].peak_memory_mib.extend(_peak_memory_mib(step[name], batches[m], context))
    rows = [
        _row(arguments, name, m, plans[name], timed["one stage", m], timed[name, m], times[name])
        for m in MICRO_BATCHES
        for name in built
    ]
    if context.is_main:
        _show(rows)
        for row in rows:
            append_row(arguments.out, row)
    return 0 if all(row["floor_reached"] and row["simulator_agrees"] for row in rows) else 1


def _check_equal(
    single: SingleStage,
    built: Mapping[Recompute, BuiltEngine],
    batches: list[Batch],
    context: DistributedContext,
) -> None:
    for _ in range(2):
        single.step(batches)
    expected = single.adapter()
    for name, engine in built.items():
        for _ in range(2):
            engine.engine.train_step(batches, LEARNING_RATE)
        trained = context.share(engine.engine.adapter_tensors())
        assert trained.keys() == expected.keys(), name
        different = [key for key, tensor in trained.items() if not torch.equal(tensor, expected[key])]
        assert not different, f"{name}: {different} differ from what one stage trains"
    if context.is_main:
        print(f"{len(expected)} tensors of the adapter equal after two steps, bit for bit")


def _seconds(
    step: Callable[[list[Batch]], object],
    batches: list[Batch],
    context: DistributedContext,
) -> float:
    """Of one step; every rank works, on one stage too, so that none has the memory to itself."""
    dist.barrier()
    started = time.perf_counter()
    step(batches)
    mine = time.perf_counter() - started
    return context.sum([mine])[0] / context.world_size


def _peak_memory_mib(
    step: Callable[[list[Batch]], object],
    batches: list[Batch],
    context: DistributedContext,
) -> list[float]:
    """What a step takes beyond what is held between steps, by rank."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_mib("VmRSS")
    dist.barrier()
    step(batches)
    mine = [0.0] * context.world_size
    mine[context.rank] = _status_mib("VmHWM") - before
    return context.sum(mine)


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


class PassClock:
    """Times the passes of one stage while it trains; what they wait for is not in them."""

    def __init__(self, built: BuiltEngine) -> None:
        engine: Any = built.engine
        self.inner, self.width = engine.engine, engine.stage.boundary_width
        self.seconds: dict[str, list[float]] = {"forward": [], "recompute": [], "backward": []}
        instructions = dict(self.inner._INSTRUCTION_MAP)
        kinds = {kind.__name__: kind for kind in instructions}
        for name, kind in (("forward", kinds["ForwardPass"]), ("backward", kinds["BackwardPass"])):
            instructions[kind] = self._timed(name, instructions[kind])
        self.inner._INSTRUCTION_MAP = instructions
        self.inner._finish_again = self._timed("recompute", self.inner._finish_again)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name].append(time.perf_counter() - started)
            return result

        return call

    def stage_times(self, num_tokens: int, context: DistributedContext) -> list[StageTimes]:
        """Medians, of every stage."""
        transfer = _transfer_seconds((1, num_tokens, self.width), context)
        mine = [statistics.median(seconds) if seconds else 0.0 for seconds in self.seconds.values()]
        everyone = [0.0] * (len(mine) * STAGES)
        everyone[context.rank * len(mine) : (context.rank + 1) * len(mine)] = mine
        of_each = zip(*[iter(context.sum(everyone))] * len(mine), strict=True)
        return [
            StageTimes(forward, backward, recompute, transfer, transfer)
            for forward, recompute, backward in of_each
        ]


def _transfer_seconds(shape: tuple[int, ...], context: DistributedContext, repeats: int = 20) -> float:
    """Of one tensor between stages, both of them ready."""
    tensor = torch.zeros(shape, dtype=getattr(torch, DTYPE))
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        dist.send(tensor, 1) if context.rank == 0 else dist.recv(tensor, 0)
        seconds.append(time.perf_counter() - started)
    return context.max([statistics.median(seconds)])[0]


def _row(
    arguments: argparse.Namespace,
    name: Recompute,
    m: int,
    plan: StagePlan,
    one: Timed,
    pipeline: Timed,
    times: list[StageTimes],
) -> dict[str, Any]:
    bound = m / (m + STAGES - 1)
    efficiency = one.median / (STAGES * pipeline.median)
    # A stage's recompute on the gradient is timed within its backward pass.
    simulated = simulate(times, m, name if name == "while_waiting" else "none").total_seconds
    return {
        "benchmark": "pipeline_efficiency",
        "recompute": name,
        "num_micro_batches": m,
        "num_stages": STAGES,
        "layers": [len(layers) for layers in plan.layers],
        "layers_ahead": plan.layers_ahead,
        "one_stage_seconds": one.median,
        "step_seconds": pipeline.median,
        "efficiency": efficiency,
        "bound": bound,
        "efficiency_of_bound": efficiency / bound,
        "floor": FLOOR[name],
        "floor_reached": efficiency / bound >= FLOOR[name],
        "peak_memory_mib": pipeline.peak_memory_mib,
        "one_stage_peak_memory_mib": one.peak_memory_mib,
        "simulated_seconds": simulated,
        "simulator_agrees": abs(simulated / pipeline.median - 1) <= SIMULATOR_TOLERANCE,
        "stage_times": [asdict(stage) for stage in times],
        "repeats": arguments.repeats,
        "tokens": arguments.tokens,
        "compute_dtype": DTYPE,
        "model": MODEL,
        "all_step_seconds": pipeline.seconds,
        "all_one_stage_seconds": one.seconds,
    }


def _show(rows: list[dict[str, Any]]) -> None:
    print("recompute       m  layers  one stage      step  of bound  floor  simulated  peak memory by rank")
    for row in rows:
        memory = " ".join(f"{peak:.0f}" for peak in row["peak_memory_mib"])
        layers = "/".join(map(str, row["layers"]))
        print(
            f"{row['recompute']:14}  {row['num_micro_batches']}  {layers:>6}"
            f"  {row['one_stage_seconds']:7.3f} s  {row['step_seconds']:6.3f} s"
            f"  {row['efficiency_of_bound']:8.3f}  {row['floor']:5.2f}"
            f"  {row['simulated_seconds']:7.3f} s  {memory} MiB"
            f"{'' if row['floor_reached'] and row['simulator_agrees'] else '  MISSED'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--tokens", type=int, default=256, help="tokens of a micro-batch (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=15, help="timed steps of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="rows are added here (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return measure(arguments)
    return start_ranks(STAGES)


def start_ranks(number: int) -> int:
    """This script once for each rank; the highest of their exit codes."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    everyone = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, **everyone, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(number)
    ]
    return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
