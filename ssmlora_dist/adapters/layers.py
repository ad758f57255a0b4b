"""Adapters on one frozen linear layer, dense or quantised.

Shapes: B batch, S tokens, D in-features, O out-features, R rank. Adapter parameters are float32 (float64
under a float64 layer) whatever the layer's storage; products run in the dtype of the input.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops import reference


def _adapter_dtype(base_layer: nn.Linear) -> torch.dtype:
    dtype = base_layer.weight.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


class LoRALinear(nn.Module):
    """y = x W_0 + scaling * dropout(x) W_a W_b (Hu et al. 2021, arXiv 2106.09685).

    Args:
        base_layer: the frozen layer; anything with `in_features`, `out_features` and `weight`.
        rank: R.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an input feature of the adapter while training.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.rank, self.scaling, self.dropout = rank, alpha / rank, dropout
        device, dtype = base_layer.weight.device, _adapter_dtype(base_layer)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws `lora_A` (Kaiming uniform, a = sqrt 5), on the CPU for all devices alike; `lora_B` = 0."""
        drawn = torch.empty(self.lora_A.weight.shape, dtype=self.lora_A.weight.dtype)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B,S,D] -> [B,S,O] in the dtype of the base layer's output."""
        base_BSO = self.base_layer(x_BSD)
        dropped_BSD = F.dropout(x_BSD, self.dropout, self.training)
        z_BSR = F.linear(dropped_BSD, self.lora_A.weight.to(x_BSD.dtype))
        delta_BSO = F.linear(z_BSR, self.lora_B.weight.to(x_BSD.dtype)) * self.scaling
        return base_BSO + delta_BSO.to(base_BSO.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class SSMLoRALinear(LoRALinear):
    """A time module: LoRA whose low-rank code takes one state step along depth (arXiv 2502.04958).

    The maths is `ops.reference.time_module`. `step` is the pure form, state in and state out. A decoder
    layer calls its projection with the input alone, so `forward` reads and writes the `LayerState` that the
    layer binds for the length of its own call (`adapters.state`).

    Args:
        base_layer, rank, alpha, dropout: as for `LoRALinear`; dropout acts on the normalised state.
        axis: index of the module's time axis in the state [B,S,A,R].
        normalization, carry, detach_state: as for `ops.reference.time_module`.
        state_input_scale: `state_input` starts as this multiple of the identity.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        axis: int = 0,
        normalization: str = "minmax",
        carry: str = "normalized",
        detach_state: bool = False,
        state_input_scale: float = 0.1,
    ) -> None:
        super().__init__(base_layer, rank, alpha, dropout)
        self.axis = axis
        self.normalization, self.carry, self.detach_state = normalization, carry, detach_state
        self.state_input_scale = state_input_scale
        self.state_transition = nn.Parameter(self.lora_A.weight.new_empty(rank, rank))
        self.state_input = nn.Parameter(self.lora_A.weight.new_empty(rank, rank))
        self.layer_state: LayerState | None = None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As LoRA, with `state_transition` = 0 and `state_input` = scale * I."""
        super().reset_parameters(generator)
        with torch.no_grad():
            self.state_transition.zero_()
            self.state_input.copy_(torch.eye(self.rank) * self.state_input_scale)

    def step(self, x_BSD: Tensor, h_prev_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """([B,S,D], state [B,S,R]) -> ([B,S,O], state [B,S,R] in float32); pure."""
        mask_BSR = None
        if self.training and self.dropout > 0:
            mask_BSR = F.dropout(torch.ones_like(h_prev_BSR, dtype=torch.float32), self.dropout)
        return reference.time_module(
            x_BSD,
            self.base_layer(x_BSD),
            h_prev_BSR,
            self.lora_A.weight,
            self.lora_B.weight,
            self.state_transition,
            self.state_input,
            scaling=self.scaling,
            normalization=self.normalization,
            carry=self.carry,
            detach_state=self.detach_state,
            dropout_mask_BSR=mask_BSR,
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B,S,D] -> [B,S,O] inside a decoder layer that has bound its state.

        Raises:
            AdapterError: when called outside such a layer; `step` is the form for that.
        """
        if self.layer_state is None:
            raise AdapterError(
                "a time module was called outside of its decoder layer, so it has no state; "
                "call the decoder layer, or `step(x, state)`"
            )
        y_BSO, state_BSR = self.step(x_BSD, self.layer_state.read(self.axis))
        self.layer_state.write(self.axis, state_BSR)
        return y_BSO


class LayerState:
    """The state while one decoder layer runs: unstacked at entry, stacked and rounded at exit.

    It lives no longer than that call: what enters and what leaves are tensors.
    """

    def __init__(self, state_BSAR: Tensor) -> None:
        self._dtype = state_BSAR.dtype
        self._columns = list(state_BSAR.unbind(2))

    def read(self, axis: int) -> Tensor:
        """State [B,S,R] of one axis, as it entered the layer."""
        return self._columns[axis]

    def write(self, axis: int, state_BSR: Tensor) -> None:
        """Hands on the state of one axis."""
        self._columns[axis] = state_BSR

    def packed(self) -> Tensor:
        """[B,S,A,R], rounded to the dtype in which the state entered."""
        return torch.stack([column.to(self._dtype) for column in self._columns], dim=2)
