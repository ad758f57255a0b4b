"""The state's health: what each form measures of it, as means over tokens by time axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.ops.registry import form_named


class StateHealth:
    """Sums over the tokens that passed through the adapters of each axis.

    Args:
        axes: names of the time axes, and of their forms.
        device: where the sums are kept.

    Attributes:
        sums: one for each figure of each axis, behind them the numbers of tokens, one for each axis.
    """

    def __init__(self, axes: Mapping[str, str], device: torch.device) -> None:
        self.axes = list(axes)
        self.figures = [form_named(form).figures for form in axes.values()]
        self.sums = torch.zeros(sum(map(len, self.figures)) + len(axes), dtype=torch.float64, device=device)

    def add(self, axis: int, values: Sequence[Tensor]) -> None:
        """Counts what one adapter measured, [B,S] each, at least one."""
        first = sum(map(len, self.figures[:axis]))
        for index, value in enumerate(values, first):
            self.sums[index] += value.sum().to(self.sums)
        self.sums[axis - len(self.axes)] += values[0].numel()

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Means per token by name and axis, from `sums`, added up over the ranks."""
        counts = sums[len(sums) - len(self.axes) :]
        counted = [
            (f"state_{figure}_{axis}", count)
            for axis, figures, count in zip(self.axes, self.figures, counts, strict=True)
            for figure in figures
        ]
        return {name: total / count for (name, count), total in zip(counted, sums, strict=False) if count}


@contextmanager
def watch_state(model: nn.Module, axes: Mapping[str, str], device: torch.device) -> Iterator[StateHealth]:
    """Watches every forward pass of `model` in the body; the passes compute what they always do."""
    health = StateHealth(axes, device)

    @torch.no_grad()
    def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, LoRALinear)
        z_BSR, state = module.form_inputs(inputs[0])
        health.add(module.form.axis, module.form.measure(z_BSR, state, module.form_parameters))

    hooks = [
        module.register_forward_pre_hook(observe)
        for module in model.modules()
        if isinstance(module, LoRALinear) and module.form.has_state and module.form.figures
    ]
    try:
        yield health
    finally:
        for hook in hooks:
            hook.remove()
