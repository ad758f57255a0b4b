"""One training step of a configured run, traced: see `trace_step`.

config = load_config("configs/llama_ssmlora.json", check_files=False, device_type="cuda", world_size=1)
traced = trace_step(config, num_layers=2, tokens=4096)
traced.peak_bytes, traced.bytes_by_kind, traced.syncs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.projections import EXPERTS, linear_layers
from ssmlora_dist.batches import Batch
from ssmlora_dist.config.schema import ParallelSection, RunConfig
from ssmlora_dist.data import Example
from ssmlora_dist.data.collation import collate
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.distributed.engine import DataParallelEngine
from ssmlora_dist.fake_cuda.pretend import as_real_tensors, one_device, pretended_cuda
from ssmlora_dist.fake_cuda.watch import (
    ADAPTERS,
    ATTENTION,
    BACKWARD,
    CHECKPOINTS,
    DEQUANTISED,
    FORWARD,
    KINDS,
    LOGITS,
    MLP,
    NORMS,
    OPTIMIZER,
    OTHER,
    PHASES,
    STEP,
    Sync,
    Watch,
)
from ssmlora_dist.models import decoder_layers, recompute, structure_of
from ssmlora_dist.models.configuration import load_config
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.quantization import QuantizedExperts
from ssmlora_dist.quantization.linear import Linear4bit, Linear8bit
from ssmlora_dist.training.topology import ParallelDims, build_engine

# Samples that share a packed row.
SAMPLES_A_ROW = 4
_LEARNING_RATE = 1e-4
_FIRST_TOKENS = 64
# Of a configuration, what a bare one does not take.
_NOT_SHAPES = ("transformers_version", "architectures", "_name_or_path", "quantization_config")


@dataclass(frozen=True)
class Traced:
    """What one training step asks of one device.

    Attributes:
        peak_bytes: of storages alive on the device at most, the model included, each rounded up as torch's
            allocator does; without what is within an operator, gaps, and the CUDA context.
        bytes_by_kind: of them at the peak, by `watch.KINDS`.
        launches: kernels by phase (`watch.PHASES`).
        operators: the same by phase and operator.
        syncs: where the host waits for the device.
        moved_bytes: read and written by operators, by phase.
        model_bytes: alive before the first step.
        host_bytes: of checkpoints in host memory at most.
    """

    peak_bytes: int
    bytes_by_kind: dict[str, int]
    launches: dict[str, int]
    operators: dict[tuple[str, str], int]
    syncs: tuple[Sync, ...]
    moved_bytes: dict[str, int]
    model_bytes: int
    host_bytes: int


def trace_step(
    config: RunConfig,
    *,
    num_layers: int | None = None,
    tokens: int,
    rows: int = 1,
    supervised: int | None = None,
    padding: int = 0,
    micro_batches: int = 1,
    num_ranks: int | None = None,
    device: str = "cuda",
    fake: bool = True,
) -> Traced:
    """Traces a step of a run's optimiser, through the run's own code, once its moments are there.

    Neither weights nor data are read. What a pipeline, ranks that share rows or offloading by DeepSpeed
    change is not in it. flash-attention is traced as torch's own kernel of that name, which keeps as much.

    Args:
        config: of the run; of a hub model `config.json` is read.
        num_layers: decoder layers; None: as many as the model has. From four on every two (or every period
            of kinds of layers) add the same; from two on where activations weigh more than adapters do.
        tokens: of a row; packed rows hold `SAMPLES_A_ROW` samples.
        rows: of a micro-batch.
        supervised: tokens of a micro-batch with a loss, at most; None: all that can have one.
        padding: tokens behind every row but the first, of `tokens`.
        micro_batches: of the step.
        num_ranks: that share the step, of which the first is traced, with DeepSpeed's engine at the ZeRO
            stage of `config`; their collectives move nothing. None: one alone at ZeRO 0, where DeepSpeed
            adds nothing on the device, and is not imported.
        device: `cuda` (fake) or `cpu`.
        fake: tensors without storage; real ones are counted by the same code, on the CPU.

    Raises:
        SSMLoRAError: as the run would.
        FakeCudaError: no g++.
    """
    assert fake or device == "cpu", "real CUDA tensors are measured, not traced"
    assert num_ranks is None or device == "cuda", "DeepSpeed is asked to compute on CUDA"
    traced = _TracedRun(_traced_config(config, num_layers, device, num_ranks), device, fake, num_ranks)
    job = (rows, tokens, supervised, padding)
    with traced.running():
        model_bytes = traced.build()
        traced.make_moments(tokens)
        traced.watch.reset()
        traced.step([traced.batch(*job) for _ in range(micro_batches)])
        watch = traced.watch
        launches: Counter[str] = Counter()
        for (phase, _), number in watch.launches.items():
            launches[phase] += number
        return Traced(
            watch.peak_bytes,
            {kind: watch.peak_by_kind.get(kind, 0) for kind in KINDS},
            {phase: launches[phase] for phase in PHASES},
            dict(watch.launches),
            tuple(watch.syncs),
            {phase: watch.moved_bytes[phase] for phase in PHASES},
            model_bytes,
            watch.peak_host_bytes,
        )


class _TracedRun:
    """A run's engine whose steps are watched.

    Args:
        config: of one rank alone.
        device_type: where it computes.
        fake: whether tensors have no storage.
        num_ranks: see `trace_step`.
    """

    def __init__(self, config: RunConfig, device_type: str, fake: bool, num_ranks: int | None = None) -> None:
        self.config, self.num_ranks = config, num_ranks
        self.device = torch.device(device_type, 0) if device_type == "cuda" else torch.device(device_type)
        self.watch = Watch(device_type)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Where everything else is called."""
        pretended = pretended_cuda if self.device.type == "cuda" else as_real_tensors
        with ExitStack() as stack:
            stack.enter_context(pretended())
            if self.num_ranks is not None:
                # Imported here, as it imports deepspeed.
                from ssmlora_dist.distributed.pretended import pretended_ranks

                stack.enter_context(one_device())
                stack.enter_context(pretended_ranks(self.num_ranks))
            for target, name, value in self._marks():
                stack.enter_context(mock.patch.object(target, name, value))
            yield

    def build(self) -> int:
        """Makes the model and its engine; the bytes of the model."""
        with self.mode, self.watch:
            number = self.num_ranks or 1
            context, dims = _FirstRank(0, number, 0, self.device), ParallelDims(0, number, 0, 1)
            built = build_engine(self.config, context, dims, plan=None, warn=lambda _: None)
        assert isinstance(built.engine, DataParallelEngine)
        self.engine = built.engine
        self.watch.kinds = kinds_of(self.engine.module)
        for parameter in self.engine.parameters.values():
            self.watch.label(parameter, ADAPTERS)
            parameter.register_post_accumulate_grad_hook(self._label_gradient)
        return self.watch.live_bytes

    def make_moments(self, tokens: int) -> None:
        """Gives the optimiser, and DeepSpeed, what they make in the first step."""
        if self.num_ranks is not None:
            self.step([self.batch(1, min(tokens, _FIRST_TOKENS), None, 0)])
            return
        with self.mode, self.watch, self.watch.during(OPTIMIZER):
            for parameter in self.engine.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            self.engine.engine.step()

    def batch(self, rows: int, tokens: int, supervised: int | None, padding: int) -> Batch:
        """A micro-batch as the loader makes it, on the CPU."""
        lengths = [[tokens]] + [[tokens - padding]] * (rows - 1)
        if self.config.data.packing:
            part = max(2, tokens // SAMPLES_A_ROW)
            lengths = [[part] * (row // part - 1) + [row - part * (row // part - 1)] for [row] in lengths]
        left = tokens * rows if supervised is None else supervised
        examples: list[list[Example]] = []
        for row in lengths:
            examples.append([])
            for length in row:
                own = min(left, length - 1)
                left -= own
                is_target = np.arange(length) >= length - own
                examples[-1].append(Example.from_tokens([0] * length, is_target.tolist()))
        seeds = [[0] * len(row) for row in lengths] if self.config.adapter.dropout else None
        return collate(examples, 0, seeds)

    def step(self, micro_batches: Sequence[Batch]) -> None:
        """One step of the optimiser."""
        given = [self._given(batch) for batch in micro_batches]
        with self.mode, self.watch, self.watch.during(STEP):
            self.engine.train_step(given, _LEARNING_RATE)

    def _given(self, batch: Batch) -> Batch:
        """The batch in host memory, which is that of the device on a CPU: counted there from the start."""

        def given(tensor: Tensor) -> Tensor:
            if isinstance(self.mode, FakeTensorMode):
                tensor = self.mode.from_tensor(tensor)
            self.watch.label(tensor, OTHER)
            return tensor

        return replace(
            batch,
            inputs={name: given(tensor) for name, tensor in batch.inputs.items()},
            targets=given(batch.targets),
            places=given(batch.places),
            columns=given(batch.columns),
            column_places=given(batch.column_places),
        )

    def _label_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.watch.label(parameter.grad, ADAPTERS)

    def _marks(self) -> list[tuple[Any, str, Any]]:
        """What is put in the place of functions, to know what is computed."""
        watch, call = self.watch, nn.Module.__call__
        copier = recompute.Copier

        def of_kind(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with watch.within(kind):
                    return function(*args, **kwargs)

            return run

        def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with watch.within(watch.kinds.get(module)):
                return call(module, *args, **kwargs)

        def checkpoint(run: Any, *tensors: Tensor, **settings: Any) -> Any:
            for tensor in tensors:
                watch.label(tensor, CHECKPOINTS)
            return kept_checkpoint(run, *tensors, **settings)

        def empty_on_host(self: Any, tensor: Tensor) -> Tensor:
            on_host = kept_empty_on_host(self, tensor)
            watch.count_on_host(on_host)
            return on_host

        def start(
            self_: DataParallelEngine, model: nn.Module, optimizer: torch.optim.Optimizer, config: Any
        ) -> Any:
            if self.num_ranks is None:
                return _Phases(_Unsharded(model, optimizer), watch)
            return _Phases(kept_start(self_, model, optimizer, config), watch)

        kept_start = DataParallelEngine.start
        kept_checkpoint, kept_empty_on_host = recompute.checkpoint, copier.empty_on_host
        return [
            (nn.Module, "__call__", call_module),
            (recompute, "checkpoint", checkpoint),
            (copier, "empty_on_device", of_kind(CHECKPOINTS, copier.empty_on_device)),
            (copier, "empty_on_host", empty_on_host),
            *(
                (kind, "dequantize", of_kind(DEQUANTISED, kind.dequantize))
                for kind in (Linear4bit, Linear8bit, QuantizedExperts)
            ),
            (DataParallelEngine, "start", start),
        ]


class _FirstRank(DistributedContext):
    """Rank 0, whose fellows have what it has."""

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) * self.world_size for value in values]

    def max(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]


class _Unsharded:
    """In the place of DeepSpeed's engine at ZeRO 0 on one rank."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def __call__(self, batch: Batch) -> Any:
        return self.module(batch)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Gradients stay until the step anyway."""

    def backward(self, loss: Tensor, **_: Any) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class _Phases:
    """An engine that tells a watch what it is at."""

    def __init__(self, engine: Any, watch: Watch) -> None:
        self._engine, self._watch = engine, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def __call__(self, batch: Batch) -> Any:
        with self._watch.during(FORWARD):
            return self._engine(batch)

    def backward(self, loss: Tensor, **settings: Any) -> None:
        with self._watch.during(BACKWARD):
            self._engine.backward(loss, **settings)

    def step(self) -> None:
        with self._watch.during(OPTIMIZER):
            self._engine.step()


def kinds_of(module: Any) -> dict[nn.Module, str]:
    """The kinds of `watch.KINDS` that modules of a loss compute."""
    model = module.model
    kinds: dict[nn.Module, str] = {module: LOGITS, model: LOGITS}
    structure = structure_of(model)
    kinds[model.get_submodule(structure.decoder)] = OTHER
    for layer in decoder_layers(model).values():
        kinds[layer] = OTHER
        for child in layer.children():
            if not (linear_layers(child) or isinstance(child, nn.Linear) or _has_experts(child)):
                continue
            kinds[child] = ATTENTION if "Attention" in type(child).__name__ else MLP
            for inner in child.modules():
                if isinstance(inner, LoRALinear):
                    kinds |= {inner: ADAPTERS, inner.base_layer: kinds[child]}
    for inner in model.modules():
        if type(inner).__name__.endswith("Norm"):
            kinds[inner] = NORMS
    return kinds | {module.head: LOGITS}


def _has_experts(module: nn.Module) -> bool:
    return any(hasattr(inner, EXPERTS) for inner in module.modules())


def _traced_config(
    config: RunConfig, num_layers: int | None, device_type: str, num_ranks: int | None
) -> RunConfig:
    """The run with a backbone of random weights and so many layers."""
    section = config.model
    shapes = load_config(section.path, config=section.config, revision=section.revision)
    text_config = shapes.get_text_config()
    values = shapes.to_diff_dict()
    kept = text_config.num_hidden_layers
    if num_layers is not None:
        values |= {
            key: value[:num_layers]
            for key, value in text_config.to_dict().items()
            if isinstance(value, list) and len(value) == kept
        }
        values["num_hidden_layers"] = num_layers
    values = {key: value for key, value in values.items() if key not in _NOT_SHAPES}
    attention = "sdpa" if section.attention == "flash_attention_2" else section.attention
    model = section.model_copy(
        update={"path": None, "revision": None, "init": "random", "config": values, "attention": attention}
    )
    sizes = {"micro_batch_size": 1, "global_batch_size": num_ranks or 1}
    zero_stage = 0 if num_ranks is None else config.parallel.zero_stage
    traced = config.model_copy(
        update={
            "model": model,
            "adapter": config.adapter.until_probed,
            "training": config.training.model_copy(update=sizes),
            "parallel": ParallelSection(zero_stage=zero_stage),
        }
    )
    return traced.with_auto_dtype(machine_dtype(device_type))
