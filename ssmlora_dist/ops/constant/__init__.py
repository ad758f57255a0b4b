"""A control: what a state is worth beyond a constant in its place. The truth is reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssmlora_dist.ops.constant.reference import step
from ssmlora_dist.ops.form import Drop, Form, Parameters
from ssmlora_dist.ops.registry import register_form


@register_form
@dataclass(frozen=True, kw_only=True)
class Constant(Form):
    """u = z + dropout(c): c takes the place of n, and nothing is handed on; plain LoRA while c = 0."""

    name: ClassVar[str] = "constant"
    has_state: ClassVar[bool] = False

    def start_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """c = 0."""
        return {"state_constant": torch.zeros(self.rank)}

    def step(self, z: Tensor, state: Any, parameters: Parameters, drop: Drop) -> tuple[Tensor, None]:
        """See `Form.step`."""
        return step(z, parameters["state_constant"], drop), None
