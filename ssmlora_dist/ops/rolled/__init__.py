"""A control: what a state is worth beyond one that fits no token. The truth is reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ssmlora_dist.ops.form import Drop, Gradients, Inputs, Parameters
from ssmlora_dist.ops.registry import register_form
from ssmlora_dist.ops.rolled.reference import received
from ssmlora_dist.ops.ssmlora import SSMLoRA


@register_form
@dataclass(frozen=True, kw_only=True)
class Rolled(SSMLoRA):
    """SSMLoRA, but each row of the batch receives the state of the row after it.

    A sample's output thus depends on the others of its batch; in a batch of one row it is SSMLoRA itself.
    """

    name: ClassVar[str] = "rolled"

    def step(self, z: Tensor, state: Any, parameters: Parameters, drop: Drop) -> tuple[Tensor, Tensor]:
        """See `Form.step`."""
        return super().step(z, received(state), parameters, drop)

    def measure(self, z: Tensor, state: Any, parameters: Parameters) -> tuple[Tensor, ...]:
        """See `SSMLoRA.measure`."""
        return super().measure(z, received(state), parameters)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See `Form.forward`."""
        return super().forward(inputs._replace(state=received(inputs.state)))

    def backward(
        self, inputs: Inputs, d_u: Tensor, d_handed_on: Tensor | None, needs_d_state: bool
    ) -> Gradients:
        """See `Form.backward`."""
        inputs = inputs._replace(state=received(inputs.state))
        u, d_z, d_state, d_parameters = super().backward(inputs, d_u, d_handed_on, needs_d_state)
        return u, d_z, None if d_state is None else d_state.roll(1, 0), d_parameters
