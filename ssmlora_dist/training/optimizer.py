"""The optimiser by its name in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ssmlora_dist.distributed.engine import RATE_RATIO
from ssmlora_dist.quantization.optimizers import PAGED_FROM, low_memory_adamw


def build_optimizer(
    kind: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    lora_b_ratio: float = 1.0,
    state_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW over `parameters`: a group for each learning rate, the lowest first, by name inside.

    Args:
        kind: `adamw`, or bitsandbytes' `adamw_8bit`, `paged_adamw`, `paged_adamw_8bit` (CUDA).
        parameters: what is trained, by full name.
        learning_rate: at the start; the loop sets it anew at every step.
        betas: decay rates of the two moments.
        epsilon: added to the denominator.
        weight_decay: decoupled, as a multiple of each group's learning rate.
        lora_b_ratio: learning rate of `lora_B` over that of `lora_A` (LoRA+, arXiv 2402.12354).
        state_ratio: of the parameters of the forms of the state over that of `lora_A`.
    """
    by_ratio: dict[float, list[nn.Parameter]] = {}
    for name, parameter in sorted(parameters.items()):
        ratio = _ratio(name, lora_b_ratio, state_ratio)
        by_ratio.setdefault(ratio, []).append(parameter)
    ordered: list[dict[str, Any]] = [
        {"params": own, "lr": learning_rate * ratio, RATE_RATIO: ratio}
        for ratio, own in sorted(by_ratio.items())
    ]
    if kind == "adamw":
        return torch.optim.AdamW(
            ordered, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
        )
    return low_memory_adamw(
        kind, ordered, learning_rate=learning_rate, betas=betas, epsilon=epsilon, weight_decay=weight_decay
    )


def unpaged_text(optimizer: torch.optim.Optimizer) -> str | None:
    """Says of a paged optimiser that has nothing to page that it has not; None of others."""
    sizes = [parameter.numel() for group in optimizer.param_groups for parameter in group["params"]]
    if not getattr(optimizer, "is_paged", False) or max(sizes) >= PAGED_FROM:
        return None
    return (
        f"training.optimizer: bitsandbytes pages the moments of tensors of {PAGED_FROM:,} values and more, "
        f"and the largest of what is trained has {max(sizes):,}: nothing is paged"
    )


def _ratio(name: str, lora_b_ratio: float, state_ratio: float) -> float:
    if name.endswith("lora_B.weight"):
        return lora_b_ratio
    return state_ratio if name.rpartition(".")[2].startswith("state_") else 1.0
