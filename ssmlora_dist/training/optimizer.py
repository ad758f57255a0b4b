"""The optimiser by its name in the configuration."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ssmlora_dist.quantization.optimizers import low_memory_adamw


def build_optimizer(
    kind: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW over `parameters` in the order of their names.

    Args:
        kind: `adamw`, or bitsandbytes' `adamw_8bit`, `paged_adamw`, `paged_adamw_8bit` (CUDA).
        parameters: what is trained, by full name.
        learning_rate: at the start; the loop sets it anew at every step.
        betas: decay rates of the two moments.
        epsilon: added to the denominator.
        weight_decay: decoupled, as a multiple of the learning rate.
    """
    ordered = [parameter for _, parameter in sorted(parameters.items())]
    if kind == "adamw":
        return torch.optim.AdamW(
            ordered, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
        )
    return low_memory_adamw(
        kind, ordered, learning_rate=learning_rate, betas=betas, epsilon=epsilon, weight_decay=weight_decay
    )
