"""Pipeline parallelism on DeepSpeed's engine: 1F1B over stages, times data parallelism, ZeRO 0 and 1.

Every rank makes the same micro-batches of token ids, masks, seeds and labels, so that one float tensor is all
that crosses a stage boundary, and its shape is known on both sides: micro-batches may differ in length.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe import schedule as ds_schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor, nn

from ssmlora_dist.batches import Batch, count
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.distributed.engine import (
    Check,
    StepResult,
    clip_coefficient,
    no_check,
    on_host,
    read_together,
    scale_gradients,
    set_learning_rate,
    squared_norms,
    step_result,
    unscaled_by,
)
from ssmlora_dist.distributed.loss_scale import LossScale
from ssmlora_dist.distributed.optimizer_state import (
    OptimizerState,
    joined_state,
    optimizer_state_pieces,
    parameter_pieces,
    restore_optimizer_state,
)
from ssmlora_dist.distributed.pieces import put_together


class PipelineParallelEngine:
    """Training over pipeline stages and data-parallel ranks.

    Args:
        stage: this rank's `models.stage.PipelineStage`.
        boundary_dtype: dtype of the tensor [B,S,W] between stages.
        num_stages: p; ranks count through the data-parallel copies of stage 0 first.
        parameters: what this stage trains, by full name.
        optimizer: over exactly these parameters, their groups with a `RATE_RATIO`.
        config: DeepSpeed's dictionary.
        context: this run's processes.
        max_grad_norm: global norm to clip to; None leaves gradients as they are.
        recompute_ahead: run what `stage.finish` runs without keeping activations, and again while a
            micro-batch's gradient is still awaited.
        loss_scale: for float16; None scales nothing.
    """

    def __init__(
        self,
        stage: Any,
        boundary_dtype: torch.dtype,
        num_stages: int,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        context: DistributedContext,
        max_grad_norm: float | None,
        recompute_ahead: bool,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.context = context
        self.loss_scale = loss_scale
        self.stage = stage
        self.parameters = dict(sorted(parameters.items()))
        self.num_stages = num_stages
        self.zero_stage: int = config["zero_optimization"]["stage"]
        # DeepSpeed describes the stages on the standard output, which holds results.
        with contextlib.redirect_stdout(io.StringIO()):
            # One "layer" a stage, of which each rank registers its own.
            module = PipelineModule([stage] * num_stages, num_stages=num_stages, partition_method="uniform")
        self.engine = _StageEngine(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=module.mpu(),
            config=config,
            config_class=DeepSpeedConfig(config, module.mpu()),
            dist_init_required=False,
        )
        self.engine.prepare(stage, self.parameters, boundary_dtype, max_grad_norm, recompute_ahead, context)

    @property
    def module(self) -> nn.Module:
        """This rank's stage."""
        return self.stage

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, check: Check = no_check
    ) -> StepResult:
        """One step of the optimiser; see `DataParallelEngine.train_step`.

        Stages are at different micro-batches at a time: `check` is called before the first one.
        """
        check()
        set_learning_rate(self.engine.optimizer, learning_rate)
        # Every stage counts the same micro-batches.
        totals = self.context.sum(count(micro_batches))
        counts = tuple(int(number) // self.num_stages for number in totals)
        num_targets = counts[0]
        self.stage.train()
        on_device = [batch.to(self.context.device) for batch in micro_batches]
        loss_scale = self.loss_scale.value if self.loss_scale else 1.0
        outcome = self.engine.run_step(
            on_device, self.context.world_size / self.num_stages / num_targets, loss_scale
        )
        loss_mean = self.context.sum([outcome.loss])[0] / num_targets
        return step_result(loss_mean, outcome.grad_norm, counts, outcome.skipped, self.loss_scale)

    def rehearse(self, micro_batches: Sequence[Batch]) -> None:
        """See `DataParallelEngine.rehearse`."""
        self.stage.train()
        self.engine.run_step([batch.to(self.context.device) for batch in micro_batches], math.nan, 1.0)

    def score(self, batches: Iterable[Batch]) -> list[Any]:
        """Scores of this replica's batches, on every stage; the stages work on different batches at once."""
        self.stage.eval()
        results = []
        with torch.no_grad():
            for batch in batches:
                on_device = batch.to(self.context.device)
                output = self.stage(self.engine.receive_activations(on_device), on_device)
                if self.engine.is_last_stage():
                    # Off the device: another rank would find its own in their place.
                    results.append(type(output)(*(values.cpu() for values in output)))
                else:
                    p2p.send(output, self.engine.next_stage)
        return list(self.context.gather(results)[self._rank_of_stage(self.num_stages - 1)])

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The trained parameters of all stages by full name, on rank 0's CPU; every rank must call it."""
        pieces = self.context.collect(lambda: parameter_pieces(self.parameters), self._first_replica)
        return put_together(chain(*pieces)).get("", {})

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's moments of all stages, on rank 0's CPU; every rank must call it."""
        ranks = range(self.context.world_size) if self.zero_stage else self._first_replica
        parts = (self.engine.optimizer, self.parameters, self.zero_stage)
        return joined_state(self.context.collect(lambda: optimizer_state_pieces(*parts), ranks))

    @property
    def _first_replica(self) -> range:
        """Its rank of each stage: see `training.topology.ParallelDims`."""
        return range(0, self.context.world_size, self.context.world_size // self.num_stages)

    def _rank_of_stage(self, stage: int) -> int:
        """The rank of this replica that has a stage."""
        num_replicas = self.context.world_size // self.num_stages
        return stage * num_replicas + self.context.rank % num_replicas

    def restore(self, optimizer_state: OptimizerState) -> None:
        """Goes on with an optimiser's moments, before the first step; every rank must call it."""
        restore_optimizer_state(self.engine.optimizer, self.parameters, self.zero_stage, optimizer_state)


class _StageEngine(PipelineEngine):
    """DeepSpeed's engine with the parts replaced that our boundary makes simpler, exact or faster."""

    def prepare(
        self,
        stage: Any,
        parameters: dict[str, nn.Parameter],
        boundary_dtype: torch.dtype,
        max_grad_norm: float | None,
        recompute_ahead: bool,
        context: DistributedContext,
    ) -> None:
        """Takes over what DeepSpeed's constructor has no argument for."""
        self.stage_module, self.named, self.context = stage, parameters, context
        self.boundary_dtype = boundary_dtype
        self.max_grad_norm = max_grad_norm
        # The last stage's backward pass follows at once: there is nothing to wait for.
        self.ahead = recompute_ahead and not self.is_last_stage()
        self.partial_forwards: dict[int, _PartialForward] = {}

    def run_step(self, batches: Sequence[Batch], scale: float, loss_scale: float) -> _StageEngine:
        """Forward and backward of all micro-batches and one update; the outcome is in the attributes.

        The gradients are those of `scale` times the loss, and on their way through the stages `loss_scale`
        times as large.
        """
        self.batches, self.scale, self.loss_scale_now = batches, scale * loss_scale, loss_scale
        self.micro_batches = len(batches)
        self.num_forwards = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss, self.grad_norm, self.skipped = math.nan, math.nan, False
        self._exec_schedule(self._train_schedule())
        return self

    def receive_activations(self, batch: Batch) -> Tensor | None:
        """The tensor [B,S,W] that the stage before sends for `batch`; None at the first stage."""
        if self.is_first_stage():
            return None
        shape = (*batch.shape, self.stage_module.boundary_width)
        received_BSW = torch.empty(shape, dtype=self.boundary_dtype, device=self.device)
        p2p.recv(received_BSW, self.prev_stage)
        return received_BSW

    def _exec_load_micro_batch(self, buffer_id: int) -> None:
        pass

    def _exec_recv_activations(self, buffer_id: int) -> None:
        # Micro-batches come in order, so the next to be computed is the one being received.
        received_BSW = self.receive_activations(self.batches[self.num_forwards])
        assert received_BSW is not None
        self.pipe_buffers["inputs"][buffer_id] = received_BSW.requires_grad_()

    def _exec_forward_pass(self, buffer_id: int) -> None:
        batch = self.batches[self.num_forwards]
        self.num_forwards += 1
        received_BSW = None if self.is_first_stage() else self.pipe_buffers["inputs"][buffer_id]
        if not self.ahead:
            self.pipe_buffers["outputs"][buffer_id] = self.stage_module(received_BSW, batch)
            return
        partial_BSW = self.stage_module.begin(received_BSW, batch)
        self.partial_forwards[buffer_id] = _PartialForward(batch, partial_BSW, _rng_state(self.device))
        with torch.no_grad():
            self.pipe_buffers["outputs"][buffer_id] = self.stage_module.finish(partial_BSW, batch)

    def _exec_send_activations(self, buffer_id: int) -> None:
        p2p.send(self.pipe_buffers["outputs"][buffer_id].detach(), self.next_stage)

    def _exec_recv_grads(self, buffer_id: int) -> None:
        if self.ahead:
            # It needs no gradient: it fills the wait for it.
            self._recompute(buffer_id)
        self.grad_layer = torch.empty_like(self.pipe_buffers["outputs"][buffer_id])
        p2p.recv(self.grad_layer, self.next_stage)

    def _recompute(self, buffer_id: int) -> None:
        partial = self.partial_forwards[buffer_id]
        if partial.tensor_BSW is not None:
            partial.detached_BSW = partial.tensor_BSW.detach().requires_grad_()
        with _with_rng_state(self.device, partial.rng_state):
            self.pipe_buffers["outputs"][buffer_id] = self.stage_module.finish(
                partial.detached_BSW, partial.batch
            )

    def _exec_backward_pass(self, buffer_id: int) -> None:
        output = self.pipe_buffers["outputs"][buffer_id]
        if self.is_last_stage():
            self.loss_sum += output.detach().double()
            # 0 x infinity: see DataParallelEngine.
            (output * (self.scale + 0.0 * output.detach())).backward()
        else:
            output.backward(self.grad_layer)
        self.pipe_buffers["outputs"][buffer_id] = None
        partial = self.partial_forwards.pop(buffer_id, None)
        if partial is not None and partial.tensor_BSW is not None and partial.tensor_BSW.requires_grad:
            assert partial.detached_BSW is not None
            partial.tensor_BSW.backward(partial.detached_BSW.grad)

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        if self.zero_optimization():
            self._force_grad_boundary = True
            with unscaled_by(self.optimizer, self.loss_scale_now):
                self._take_model_step(lr_kwargs)
            self._force_grad_boundary = False
            self.loss, self.grad_norm = read_together(self.loss_sum, self.optimizer._global_grad_norm)
            self.skipped = bool(self.optimizer.overflow)
            return
        self.grad_norm = self._read_global_norm()
        self.skipped = not math.isfinite(self.grad_norm)
        if not self.skipped:
            coefficient = clip_coefficient(self.grad_norm, self.max_grad_norm)
            scale_gradients(self.named, coefficient / self.loss_scale_now)
            self.optimizer.step()
        self.zero_grad()

    def _read_global_norm(self) -> float:
        """From per-parameter norms of all stages in the order of their names: as on one device.

        The loss comes with them.
        """
        mine = on_host({"": self.loss_sum, **squared_norms(self.named, self.loss_scale_now)})
        self.loss = mine.pop("")
        stages = self.context.gather(mine)[:: self.dp_world_size]
        by_name = sorted(item for stage in stages for item in stage.items())
        return math.sqrt(sum(square for _, square in by_name))

    _INSTRUCTION_MAP = {  # noqa: RUF012
        **PipelineEngine._INSTRUCTION_MAP,
        ds_schedule.OptimizerStep: _exec_optimizer_step,
        ds_schedule.LoadMicroBatch: _exec_load_micro_batch,
        ds_schedule.ForwardPass: _exec_forward_pass,
        ds_schedule.BackwardPass: _exec_backward_pass,
        ds_schedule.SendActivation: _exec_send_activations,
        ds_schedule.RecvActivation: _exec_recv_activations,
        ds_schedule.RecvGrad: _exec_recv_grads,
    }


@dataclass
class _PartialForward:
    """A micro-batch between `PipelineStage.begin` and `finish`: what `finish` is run with a second time.

    `detached_BSW` is `tensor_BSW` cut from its graph, so that it collects the gradient for it.
    """

    batch: Batch
    tensor_BSW: Tensor | None
    rng_state: tuple[Tensor, Tensor | None]
    detached_BSW: Tensor | None = None


def _rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _with_rng_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> Iterator[None]:
    """Draws what was drawn when `state` was taken, and leaves the generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
