"""Forms of the state that are none of the package's, registered as a user would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssmlora_dist import Form, register_form


@register_form
@dataclass(frozen=True, kw_only=True)
class Fading(Form):
    """h = decay a g + z, n = tanh h, u = z + dropout(n); hands on h."""

    decay: float = 0.9

    name: ClassVar[str] = "fading"
    figures: ClassVar[tuple[str, ...]] = ("size",)

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError("a decay lies between 0 and 1")

    def start_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"state_rates": 1 - 0.1 * torch.rand(self.rank, generator=generator)}

    def step(self, z: Tensor, state: Any, parameters: Any, drop: Any) -> tuple[Tensor, Tensor]:
        h = self.decay * parameters["state_rates"] * state + z
        return z + drop(torch.tanh(h)), h

    def measure(self, z: Tensor, state: Any, parameters: Any) -> tuple[Tensor, ...]:
        return ((self.decay * parameters["state_rates"] * state + z).norm(dim=-1),)


@register_form
@dataclass(frozen=True, kw_only=True)
class Mixing(Form):
    """Reads all axes: h = sum_a m_a g_a + z, n = tanh h, u = z + dropout(n); hands on n."""

    name: ClassVar[str] = "mixing"
    reads_all_axes: ClassVar[bool] = True

    def start_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"state_mix": torch.full((self.num_axes, self.rank), 0.5)}

    def step(self, z: Tensor, state: Any, parameters: Any, drop: Any) -> tuple[Tensor, Tensor]:
        n = torch.tanh((state * parameters["state_mix"]).sum(-2) + z)
        return z + drop(n), n
