"""bitsandbytes' AdamW variants: moments in 8 bits, or paged to host memory when the GPU runs short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ssmlora_dist.quantization.linear import bitsandbytes

PAGED_FROM = 100_000
"""Values from which on bitsandbytes pages the moments of a tensor."""
_CLASSES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}


def low_memory_adamw(
    kind: str,
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """`adamw_8bit`, `paged_adamw` or `paged_adamw_8bit`; they compute on CUDA only.

    By bitsandbytes' own thresholds tensors of less than 4,096 values keep 32-bit moments, and those of less
    than `PAGED_FROM` are not paged.
    """
    optimizer_class = getattr(bitsandbytes().optim, _CLASSES[kind])
    optimizer: torch.optim.Optimizer = optimizer_class(
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
    )
    return optimizer
