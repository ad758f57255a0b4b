"""Plain LoRA (Hu et al. 2021, arXiv 2106.09685), the form without a state: u = z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ssmlora_dist.ops.form import Drop, Form, Gradients, Inputs, Parameters
from ssmlora_dist.ops.registry import register_form


@register_form
@dataclass(frozen=True, kw_only=True)
class LoRA(Form):
    """u = z = dropout(x) W_a."""

    name: ClassVar[str] = "lora"
    has_state: ClassVar[bool] = False
    drops_input: ClassVar[bool] = True
    is_mergeable: ClassVar[bool] = True

    def step(self, z: Tensor, state: Any, parameters: Parameters, drop: Drop) -> tuple[Tensor, None]:
        """See `Form.step`."""
        return z, None

    def forward(self, inputs: Inputs) -> tuple[Tensor, None]:
        """See `Form.forward`."""
        return inputs.z, None

    def backward(
        self, inputs: Inputs, d_u: Tensor, d_handed_on: Tensor | None, needs_d_state: bool
    ) -> Gradients:
        """See `Form.backward`."""
        return inputs.z, d_u, None, []
