"""What a run has done so far, over all the times it was started."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ssmlora_dist.training.loop import StepRecord


@dataclass
class Totals:
    """Sums over the steps of a run, kept in its checkpoints in JSON types.

    Attributes:
        num_steps: steps done.
        skipped_steps: of these, how many updated nothing.
        num_tokens: tokens computed, padding included.
        num_padding_tokens: of these the padding.
        num_target_tokens: tokens with a loss.
        step_seconds: wall time of the steps.
        first_loss, last_loss: of the first and the last step; None if not finite.
    """

    num_steps: int = 0
    skipped_steps: int = 0
    num_tokens: int = 0
    num_padding_tokens: int = 0
    num_target_tokens: int = 0
    step_seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None

    def add(self, record: StepRecord) -> None:
        """Counts a step."""
        loss = record.result.loss if math.isfinite(record.result.loss) else None
        if self.num_steps == 0:
            self.first_loss = loss
        self.num_steps += 1
        self.skipped_steps = record.skipped_steps
        self.num_tokens += record.result.num_tokens
        self.num_padding_tokens += record.result.num_padding_tokens
        self.num_target_tokens += record.result.num_target_tokens
        self.step_seconds += record.step_seconds
        self.last_loss = loss

    def plain(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return asdict(self)

    def summary(self, num_ranks: int) -> dict[str, Any]:
        """As `summary.json` reports it; a rate is that of all steps, per device that of `num_ranks`."""
        seconds = self.step_seconds or math.nan
        rest = {key: value for key, value in asdict(self).items() if key != "step_seconds"}
        return {
            **rest,
            "tokens_per_second": self.num_tokens / seconds,
            "tokens_per_second_per_device": self.num_tokens / seconds / num_ranks,
            "target_tokens_per_second": self.num_target_tokens / seconds,
            "padding_share": self.num_padding_tokens / max(1, self.num_tokens),
        }
