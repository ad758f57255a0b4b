"""One training step and one evaluation pass over data-parallel ranks, ZeRO 0 to 3, on DeepSpeed's engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ssmlora_dist.batches import Batch, count
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.distributed.loss_scale import LossScale
from ssmlora_dist.distributed.optimizer_state import (
    OptimizerState,
    joined_state,
    optimizer_state_pieces,
    parameter_pieces,
    restore_optimizer_state,
)
from ssmlora_dist.distributed.pieces import put_together
from ssmlora_dist.distributed.sequence import SequenceGroup

Check = Callable[[], None]
RATE_RATIO = "rate_ratio"
"""Key of an optimiser's parameter groups: their learning rate over that of the step; without it 1."""


def no_check() -> None:
    """For a step that nobody interrupts."""


@dataclass(frozen=True)
class StepResult:
    """What one step of the optimiser did, over all ranks.

    Attributes:
        loss: mean cross-entropy over the target tokens of the global batch, in nats.
        grad_norm: global gradient norm before clipping; not finite when the step was skipped.
        num_tokens: tokens computed, padding included.
        num_padding_tokens: of these the padding.
        num_target_tokens: tokens with a loss.
        skipped: whether loss or gradients were not finite, so that nothing was updated.
        loss_scale: that the gradients were computed with; None without loss scaling.
        scale_halved: whether the step was skipped for a loss scale that was too large and is smaller now.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_padding_tokens: int
    num_target_tokens: int
    skipped: bool
    loss_scale: float | None = None
    scale_halved: bool = False


class DataParallelEngine:
    """Data-parallel training of a model's adapters, at any ZeRO stage.

    Args:
        model: a module whose forward takes a batch and returns the sum of the token losses.
        parameters: what is trained, by full name.
        optimizer: over exactly these parameters, their groups with a `RATE_RATIO`.
        config: DeepSpeed's dictionary (`ds_config.deepspeed_config`).
        context: this run's processes.
        max_grad_norm: global norm to clip to; None leaves gradients as they are.
        loss_scale: for float16; None scales nothing.
        sequence_group: the ranks that share rows, if any do.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        context: DistributedContext,
        max_grad_norm: float | None,
        loss_scale: LossScale | None = None,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        self.context = context
        self.parameters = dict(sorted(parameters.items()))
        self.max_grad_norm = max_grad_norm
        self.loss_scale = loss_scale
        self.sequence_group = sequence_group
        self.zero_stage: int = config["zero_optimization"]["stage"]
        self.engine = self.start(model, optimizer, config)

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
        """DeepSpeed's engine."""
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        return engine

    @property
    def module(self) -> nn.Module:
        """The module, to be called for evaluation."""
        return self.engine.module

    def train_step(
        self, micro_batches: Sequence[Batch], learning_rate: float, check: Check = no_check
    ) -> StepResult:
        """One step of the optimiser on this rank's share of the global batch.

        The gradient is that of the mean over all target tokens of the global batch, however they are spread
        over ranks and micro-batches.

        Args:
            micro_batches: this rank's share.
            learning_rate: of this step.
            check: called before every micro-batch; what it raises passes through, and the step is left
                undone: after that no other can be made.
        """
        set_learning_rate(self.engine.optimizer, learning_rate)
        counts = tuple(int(number) for number in self.context.sum(count(micro_batches)))
        num_targets = counts[0]
        # DeepSpeed averages gradients over the ranks; the mean wanted is over the tokens of all of them.
        loss_scale = self.loss_scale.value if self.loss_scale else 1.0
        scale = loss_scale * self.context.world_size / num_targets
        # All of them now: they are there before the device has come to them.
        on_device = [batch.to(self.context.device) for batch in micro_batches]
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.context.device)
        self.module.train()
        for index, batch in enumerate(on_device):
            check()
            self.engine.set_gradient_accumulation_boundary(index == len(on_device) - 1)
            loss = self.engine(batch)
            # 0 x infinity: a loss that is not finite makes the gradients so, and every stage skips the step.
            self.engine.backward(loss * (scale + 0.0 * loss.detach()), scale_wrt_gas=False)
            loss_sum += loss.detach()
        loss, grad_norm, skipped = self._update(loss_sum, loss_scale)
        loss_mean = self.context.sum([loss])[0] / num_targets
        return step_result(loss_mean, grad_norm, counts, skipped, self.loss_scale)

    def rehearse(self, micro_batches: Sequence[Batch]) -> None:
        """Takes the memory of a step on these micro-batches, and updates nothing; every rank calls it."""
        self.module.train()
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            self.engine.backward(self.engine(batch.to(self.context.device)) * math.nan, scale_wrt_gas=False)
        self._update(torch.zeros((), dtype=torch.float64, device=self.context.device), 1.0)

    def _update(self, loss_sum: Tensor, loss_scale: float) -> tuple[float, float, bool]:
        """The loss, the gradients' norm, and whether they were skipped: all that is read off a device."""
        if self.zero_stage > 0:
            with unscaled_by(self.engine.optimizer, loss_scale):
                self.engine.step()
            loss, grad_norm = read_together(loss_sum, self.engine.get_global_grad_norm())
            return loss, grad_norm, bool(self.engine.optimizer.overflow)
        loss, grad_norm = read_loss_and_norm(loss_sum, self.parameters, loss_scale)
        if not math.isfinite(grad_norm):
            self.engine.zero_grad()
            return loss, grad_norm, True
        scale_gradients(self.parameters, clip_coefficient(grad_norm, self.max_grad_norm) / loss_scale)
        self.engine.step()
        return loss, grad_norm, False

    def score(self, batches: Iterable[Batch]) -> list[Any]:
        """What the module returns for each of this rank's batches, in evaluation mode; of whole rows."""
        self.module.eval()
        results, is_shared = [], False
        for batch in batches:
            results.append(self.module(batch.to(self.context.device)))
            is_shared = batch.num_shards > 1
        if self.sequence_group is None or not is_shared:
            return results
        return self.sequence_group.join(results, self.context)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The trained parameters by full name, whole, on rank 0's CPU; every rank must call it."""
        ranks = range(self.context.world_size if self.zero_stage == 3 else 1)
        pieces = self.context.collect(lambda: parameter_pieces(self.parameters), ranks)
        return put_together(chain(*pieces)).get("", {})

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's moments, on rank 0's CPU; every rank must call it."""
        ranks = range(self.context.world_size if self.zero_stage else 1)
        parts = (self.engine.optimizer, self.parameters, self.zero_stage)
        return joined_state(self.context.collect(lambda: optimizer_state_pieces(*parts), ranks))

    def restore(self, optimizer_state: OptimizerState) -> None:
        """Goes on with an optimiser's moments, before the first step; every rank must call it."""
        restore_optimizer_state(self.engine.optimizer, self.parameters, self.zero_stage, optimizer_state)


def step_result(
    loss: float,
    grad_norm: float,
    counts: tuple[int, ...],
    skipped: bool,
    loss_scale: LossScale | None,
) -> StepResult:
    """What a step has done; the loss scale goes on to that of the next step.

    Args:
        loss: see `StepResult`.
        grad_norm: see there.
        counts: over all ranks, as `batches.count` gives them for one.
        skipped: see there.
        loss_scale: of the run.
    """
    num_targets, num_tokens, num_padding = counts
    result = StepResult(loss, grad_norm, num_tokens, num_padding, num_targets, skipped)
    if loss_scale is None:
        return result
    used = loss_scale.value
    return replace(result, loss_scale=used, scale_halved=loss_scale.update(loss, grad_norm))


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Of every group of parameters `RATE_RATIO` times the rate of the step."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = learning_rate * parameters.get(RATE_RATIO, 1.0)


@contextmanager
def unscaled_by(optimizer: Any, loss_scale: float) -> Iterator[None]:
    """Has the step of one of DeepSpeed's ZeRO optimisers divide gradients and their norm by the loss scale.

    The scale is its own only here: its backward pass would multiply the loss, which is scaled already.
    """
    optimizer.loss_scale = loss_scale
    yield
    optimizer.loss_scale = 1.0


def squared_norms(parameters: Mapping[str, nn.Parameter], loss_scale: float = 1.0) -> dict[str, Tensor]:
    """Squared gradient norm of each parameter that has a gradient, by name in order; unscaled.

    Numbers in float64 on the device: `on_host` reads them.
    """
    grads = {name: p.grad for name, p in sorted(parameters.items()) if p.grad is not None}
    if not any(grad.is_cuda for grad in grads.values()):
        return {name: (grad.double() / loss_scale).square().sum() for name, grad in grads.items()}
    return dict(zip(grads, squares_at_once(list(grads.values()), loss_scale).unbind(), strict=True))


def squares_at_once(grads: list[Tensor], loss_scale: float = 1.0) -> Tensor:
    """`squared_norms` [n] but for rounding, in a few launches however many there are."""
    return (torch.stack(torch._foreach_norm(grads, dtype=torch.float64)) / loss_scale).square()


def on_host(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers by name, in one copy, for which the host waits."""
    if not numbers:
        return {}
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def read_together(loss_sum: Tensor, grad_norm: Tensor | float) -> tuple[float, float]:
    """The loss [] float64 and what DeepSpeed has for the norm, in one copy."""
    norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=loss_sum.device)
    loss, norm_value = torch.stack([loss_sum, norm]).tolist()
    return loss, norm_value


def read_loss_and_norm(
    loss_sum: Tensor, parameters: Mapping[str, nn.Parameter], loss_scale: float = 1.0
) -> tuple[float, float]:
    """The loss [] float64, and the global norm of the gradients as `clip_gradients` sums it, in one copy."""
    loss, *squares = on_host({"": loss_sum, **squared_norms(parameters, loss_scale)}).values()
    return loss, math.sqrt(sum(squares))


def clip_coefficient(norm: float, max_norm: float | None) -> float:
    """What gradients of global norm `norm` are multiplied with, so that it is at most `max_norm`."""
    if max_norm is None or norm <= max_norm:
        return 1.0
    return max_norm / (norm + 1e-6)


def clip_gradients(
    parameters: Mapping[str, nn.Parameter], max_norm: float | None, loss_scale: float = 1.0
) -> float:
    """Scales gradients in place to a global norm of at most `max_norm`; returns the norm before that.

    Both are of the gradients of the loss itself: those at hand are divided by `loss_scale` on the way.

    The norm is summed from per-parameter norms in the order of their names, in float64, so that it does not
    depend on how parameters are spread over processes. Gradients are left alone when the norm is not finite.
    """
    norm = math.sqrt(sum(on_host(squared_norms(parameters, loss_scale)).values()))
    if math.isfinite(norm):
        scale_gradients(parameters, clip_coefficient(norm, max_norm) / loss_scale)
    return norm


def scale_gradients(parameters: Mapping[str, nn.Parameter], coefficient: float) -> None:
    """Multiplies gradients in place; 1 leaves every bit as it is."""
    grads = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    if coefficient != 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)
