"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate(step: int, *, schedule: str, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Learning rate of step `step`, counted from 0.

    Linear warm-up over `warmup_steps` steps reaches `peak` at the first step after them; then `cosine` and
    `linear` fall towards 0 at `num_steps`, and `constant` stays.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "constant":
        return peak
    raise ValueError(f"schedule is {schedule!r}; allowed: cosine, linear, constant")
