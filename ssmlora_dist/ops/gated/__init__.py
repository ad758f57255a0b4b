"""A state behind a gate that starts closed: plain LoRA until it opens. Equations: reference.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ssmlora_dist.ops.form import Drop, Form, Gradients, Inputs, Parameters, state_dtype
from ssmlora_dist.ops.gated.reference import rms, state_step, step
from ssmlora_dist.ops.registry import register_form

NAMES = ("state_transition", "state_input", "state_gate")


@register_form
@dataclass(frozen=True, kw_only=True)
class Gated(Form):
    """h = g + g W_c + z W_d, n = h / rms h, u = z + e * dropout(n); hands on n; plain LoRA while e = 0."""

    name: ClassVar[str] = "gated"
    figures: ClassVar[tuple[str, ...]] = ("rms", "gate")

    def start_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """W_c = 0, W_d = I, e = 0."""
        R = self.rank
        return dict(zip(NAMES, (torch.zeros(R, R), torch.eye(R), torch.zeros(R)), strict=True))

    def step(self, z: Tensor, state: Any, parameters: Parameters, drop: Drop) -> tuple[Tensor, Tensor]:
        """See `Form.step`."""
        transition, input, gate = (parameters[name] for name in NAMES)
        return step(z, state, transition, input, gate, drop)

    def measure(self, z: Tensor, state: Any, parameters: Parameters) -> tuple[Tensor, ...]:
        """The root mean square of h, and the mean |e|."""
        transition, input, gate = (parameters[name] for name in NAMES)
        size = rms(state_step(state, z, transition, input)).squeeze(-1)
        return size, gate.abs().mean().expand_as(size)

    def backward(
        self, inputs: Inputs, d_u: Tensor, d_handed_on: Tensor | None, needs_d_state: bool
    ) -> Gradients:
        """See `Form.backward`; the gradients are those of reference.py."""
        z, state, parameters, mask = inputs.z, inputs.state, inputs.parameters, inputs.mask()
        wide = state_dtype(z.dtype)
        d_u_TR, z_TR, g_TR = (tensor.reshape(-1, self.rank).to(wide) for tensor in (d_u, z, state))
        transition, input, gate = (parameters[name].to(wide) for name in NAMES)
        mask_TR = torch.ones_like(z_TR) if mask is None else mask.view(z_TR.shape)
        with torch.autocast(z.device.type, enabled=False):
            h_TR = state_step(g_TR, z_TR, transition, input)
            root_T1 = rms(h_TR)
            n_TR = h_TR / root_T1
            kept_TR = n_TR * mask_TR
            d_n_TR = gate * mask_TR * d_u_TR
            if d_handed_on is not None:
                d_n_TR = d_n_TR + d_handed_on.reshape(-1, self.rank)
            d_h_TR = (d_n_TR - n_TR * (n_TR * d_n_TR).mean(-1, keepdim=True)) / root_T1
            u_TR = z_TR + gate * kept_TR
            d_z_TR = torch.addmm(d_u_TR, d_h_TR, input.t())
            d_state = torch.addmm(d_h_TR, d_h_TR, transition.t()) if needs_d_state else None
            d_parameters = [
                torch.mm(g_TR.t(), d_h_TR),
                torch.mm(z_TR.t(), d_h_TR),
                (kept_TR * d_u_TR).sum(0),
            ]
        return (
            u_TR.to(z.dtype).view(z.shape),
            d_z_TR.to(z.dtype).view(z.shape),
            None if d_state is None else d_state.to(state.dtype).view(z.shape),
            [g.to(parameters[name].dtype) for g, name in zip(d_parameters, NAMES, strict=True)],
        )
