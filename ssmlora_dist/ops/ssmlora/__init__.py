"""The recurrence of SSMLoRA (arXiv 2502.04958): equations in README.md, the truth in reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ssmlora_dist.ops.form import Drop, Form, Gradients, Inputs, Parameters
from ssmlora_dist.ops.registry import register_form
from ssmlora_dist.ops.ssmlora import (
    operators,  # noqa: F401 (registers torch.ops.ssmlora.state_forward)
    reference,
)
from ssmlora_dist.ops.ssmlora.state_step import Recurrence

# A component of the min-max normalised state this close to 0 or 1 counts as saturated.
SATURATION_MARGIN = 0.02


@register_form
@dataclass(frozen=True, kw_only=True)
class SSMLoRA(Form):
    """h = g + g W_c + z W_d, n = normalize(h), u = z + dropout(n); hands on n or h.

    Args:
        carry: `normalized` hands on n, `raw` hands on h.
        normalization: `minmax` (the paper's), `rms` or `none`, over R.
        state_input_scale: W_d starts as this multiple of the identity.
    """

    carry: Literal["normalized", "raw"] = "normalized"
    normalization: Literal["minmax", "rms", "none"] = "minmax"
    state_input_scale: float = 0.1

    name: ClassVar[str] = "ssmlora"
    figures: ClassVar[tuple[str, ...]] = ("spread", "saturation", "dead_rows")
    scales_in_forward: ClassVar[bool] = True

    def start_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """W_c = 0 and W_d = scale I."""
        return {
            "state_transition": torch.zeros(self.rank, self.rank),
            "state_input": torch.eye(self.rank) * self.state_input_scale,
        }

    def step(self, z: Tensor, state: Any, parameters: Parameters, drop: Drop) -> tuple[Tensor, Tensor]:
        """See `Form.step`."""
        h = self._h(z, state, parameters)
        n = reference.normalize(h, self.normalization)
        return z + drop(n), n if self.carry == "normalized" else h

    def measure(self, z: Tensor, state: Any, parameters: Parameters) -> tuple[Tensor, ...]:
        """Of h: its spread, the share of saturated components, whether it is under MIN_SPREAD."""
        h = self._h(z, state, parameters)
        low, high = h.amin(-1, keepdim=True), h.amax(-1, keepdim=True)
        spread = high - low
        margin = SATURATION_MARGIN * spread
        near = (h <= low + margin) | (h >= high - margin)
        # The least and the largest component are at 0 and 1 always.
        saturated = (near.sum(-1) - 2).clamp(min=0) / max(1, self.rank - 2)
        return spread.squeeze(-1), saturated, spread.squeeze(-1) < reference.MIN_SPREAD

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Form.forward`."""
        u, handed_on = torch.ops.ssmlora.state_forward(*self._arguments(inputs))
        return u, handed_on

    def backward(
        self, inputs: Inputs, d_u: Tensor, d_handed_on: Tensor | None, needs_d_state: bool
    ) -> Gradients:
        """See `Form.backward`."""
        u, d_z, d_state, *d_parameters = torch.ops.ssmlora.state_backward(
            d_u, d_handed_on, needs_d_state, *self._arguments(inputs)
        )
        return u, d_z, d_state if needs_d_state else None, d_parameters

    def _h(self, z: Tensor, state: Tensor, parameters: Parameters) -> Tensor:
        return reference.state_step(state, z, parameters["state_transition"], parameters["state_input"])

    def _arguments(self, inputs: Inputs) -> tuple[Any, ...]:
        """Those that both operators take."""
        dropout_id, probability = inputs.dropout
        recurrence = Recurrence(inputs.scaling, self.normalization, self.carry, probability, dropout_id)
        transition, input = inputs.parameters["state_transition"], inputs.parameters["state_input"]
        return inputs.z, inputs.state, transition, input, inputs.seeds, *recurrence
