"""The state's health: how far its components spread and how often normalisation has nothing to work with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlora_dist.adapters.layers import SSMLoRALinear
from ssmlora_dist.ops.reference import MIN_SPREAD, state_step

# A component of the min-max normalised state this close to 0 or 1 counts as saturated.
SATURATION_MARGIN = 0.02


class StateHealth:
    """Sums over the tokens that passed through the time modules of each axis.

    Args:
        axes: names of the time axes.
        device: where the sums are kept.
    """

    def __init__(self, axes: Sequence[str], device: torch.device) -> None:
        self.axes = tuple(axes)
        self.sums = torch.zeros(len(self.axes), 4, dtype=torch.float64, device=device)

    def add(self, axis: int, h_BSR: Tensor) -> None:
        """Counts the raw states h [B,S,R] of one module."""
        low_BS1, high_BS1 = h_BSR.amin(-1, keepdim=True), h_BSR.amax(-1, keepdim=True)
        spread_BS1 = high_BS1 - low_BS1
        margin_BS1 = SATURATION_MARGIN * spread_BS1
        near_BSR = (h_BSR <= low_BS1 + margin_BS1) | (h_BSR >= high_BS1 - margin_BS1)
        # The least and the largest component are at 0 and 1 always.
        saturated_BS = (near_BSR.sum(-1) - 2).clamp(min=0) / max(1, h_BSR.shape[-1] - 2)
        dead_BS1 = spread_BS1 < MIN_SPREAD
        totals = [spread_BS1.sum(), saturated_BS.sum(), dead_BS1.sum(), torch.tensor(spread_BS1.numel())]
        self.sums[axis] += torch.stack([total.to(self.sums) for total in totals])

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Means per token by name and axis, from `sums` (flat; added up over the ranks)."""
        rows: dict[str, float] = {}
        for index, axis in enumerate(self.axes):
            spread, saturated, dead, count = sums[4 * index : 4 * index + 4]
            if count:
                rows[f"state_spread_{axis}"] = spread / count
                rows[f"state_saturation_{axis}"] = saturated / count
                rows[f"state_dead_rows_{axis}"] = dead / count
        return rows


@contextmanager
def watch_state(model: nn.Module, axes: Sequence[str], device: torch.device) -> Iterator[StateHealth]:
    """Watches every forward pass of `model` in the body; the passes compute what they always do."""
    health = StateHealth(axes, device)

    @torch.no_grad()
    def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, SSMLoRALinear)
        assert module.call is not None
        x_BSD = inputs[0]
        z_BSR = F.linear(x_BSD, module.lora_A.weight.to(x_BSD.dtype))
        h_prev_BSR = module.call.read(module.axis)
        health.add(module.axis, state_step(h_prev_BSR, z_BSR, module.state_transition, module.state_input))

    hooks = [m.register_forward_pre_hook(observe) for m in model.modules() if isinstance(m, SSMLoRALinear)]
    try:
        yield health
    finally:
        for hook in hooks:
            hook.remove()
