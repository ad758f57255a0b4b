"""Adapters on one frozen linear layer, dense or quantised.

Shapes: B batch, S tokens, D in-features, O out-features, R rank. Adapter parameters are float32 (float64
under a float64 layer) whatever the layer's storage; products run in the dtype of the input.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops import fused
from ssmlora_dist.ops.dropout import draw_seeds
from ssmlora_dist.ops.state_step import Recurrence


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
        stream: tells the adapter's dropout from that of all others in the model.

    Attributes:
        readers: the adapters that read the same input in every call, this one among them.
    """

    def __init__(
        self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, *, stream: int = 0
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.rank, self.scaling, self.dropout, self.stream = rank, alpha / rank, dropout, stream
        device, dtype = base_layer.weight.device, _adapter_dtype(base_layer)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, device=device, dtype=dtype)
        self.readers: list[LoRALinear] = [self]

    @property
    def call(self) -> LayerCall | None:
        """What the adapters of the decoder layer share, while it runs in this thread."""
        return running.call if self in running.adapters else None

    @property
    def drops_input(self) -> bool:
        """Whether `lora_A` reads another tensor than the base layer while training."""
        return self.dropout > 0

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws `lora_A` (Kaiming uniform, a = sqrt 5), on the CPU for all devices alike; `lora_B` = 0."""
        drawn = torch.empty(self.lora_A.weight.shape, dtype=self.lora_A.weight.dtype)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B,S,D] -> [B,S,O] in the dtype of the base layer's output."""
        x_BSD, z_BSR = self._down_project(x_BSD)
        base_BSO, is_ours = self._frozen(x_BSD)
        # Under autocast a quantised layer gives another dtype than the product with `lora_A`.
        return fused.add_lora(base_BSO, z_BSR.to(base_BSO.dtype), self.lora_B.weight, self.scaling, is_ours)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"

    def _down_project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """x, to be given to the base layer, and z [B,S,R]."""
        # ZeRO 3 hands each module an input of its own, and gathers its weights for the time of its own call.
        call = self.call
        if call is not None and len(self.readers) > 1 and not hasattr(self.lora_A.weight, "ds_id"):
            return call.down_project(self, x_BSD)
        seeds = self._dropout_seeds(x_BSD) if self.drops_input else None
        drawing = (self.stream, self.dropout, self._first_token)
        x_BSD, (z_BSR,) = fused.down_project(x_BSD, [self.lora_A.weight], seeds, *drawing)
        return x_BSD, z_BSR

    def _frozen(self, x_BSD: Tensor) -> tuple[Tensor, bool]:
        """The base layer's output, and whether it may be lost."""
        base_BSO = self.base_layer(x_BSD)
        witness: list[None] = []
        is_ours = not fused.is_held(base_BSO, witness)
        return base_BSO, is_ours

    @property
    def _first_token(self) -> int:
        call = self.call
        return 0 if call is None else call.first_token

    def _dropout_seeds(self, x_BSD: Tensor) -> Tensor | None:
        """[B]; None where nothing is dropped."""
        if not self.training or not self.dropout:
            return None
        return (self.call or LayerCall()).dropout_seeds(x_BSD.shape[0], x_BSD.device)


class SSMLoRALinear(LoRALinear):
    """A time module: LoRA whose low-rank code takes one state step along depth (arXiv 2502.04958).

    The maths is `ops.reference.time_module`. `step` is the pure form, state in and state out. A decoder
    layer calls its projection with the input alone, so `forward` reads and writes the state that the layer
    binds, in a `LayerCall`, for the length of its own call (`adapters.state`).

    Args:
        base_layer, rank, alpha, dropout, stream: as for `LoRALinear`; dropout acts on the normalised state.
        axis: index of the module's time axis in the state [B,S,A,R].
        normalization, carry, detach_state: as for `ops.reference.time_module`.
        state_input_scale: `state_input` starts as this multiple of the identity.
    """

    drops_input = False

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        *,
        stream: int = 0,
        axis: int = 0,
        normalization: str = "minmax",
        carry: str = "normalized",
        detach_state: bool = False,
        state_input_scale: float = 0.1,
    ) -> None:
        super().__init__(base_layer, rank, alpha, dropout, stream=stream)
        self.axis = axis
        self.normalization, self.carry, self.detach_state = normalization, carry, detach_state
        self.state_input_scale = state_input_scale
        self.state_transition = nn.Parameter(self.lora_A.weight.new_empty(rank, rank))
        self.state_input = nn.Parameter(self.lora_A.weight.new_empty(rank, rank))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As LoRA, with `state_transition` = 0 and `state_input` = scale * I."""
        super().reset_parameters(generator)
        with torch.no_grad():
            self.state_transition.zero_()
            self.state_input.copy_(torch.eye(self.rank) * self.state_input_scale)

    def step(self, x_BSD: Tensor, h_prev_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """([B,S,D], state [B,S,R]) -> ([B,S,O], state [B,S,R] in the dtype of the state received); pure."""
        x_BSD, z_BSR = self._down_project(x_BSD)
        base_BSO, is_ours = self._frozen(x_BSD)
        drawing = (self.dropout, self.stream, self._first_token)
        return fused.time_module(
            base_BSO,
            z_BSR.to(base_BSO.dtype),
            h_prev_BSR.detach() if self.detach_state else h_prev_BSR,
            self.lora_B.weight,
            self.state_transition,
            self.state_input,
            Recurrence(self.scaling, self.normalization, self.carry, *drawing),
            self._dropout_seeds(x_BSD),
            is_ours,
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B,S,D] -> [B,S,O] inside a decoder layer that has bound its state.

        Raises:
            AdapterError: when called outside such a layer; `step` is the form for that.
        """
        call = self.call
        if call is None:
            raise AdapterError(
                "a time module was called outside of its decoder layer, so it has no state; "
                "call the decoder layer, or `step(x, state)`"
            )
        y_BSO, state_BSR = self.step(x_BSD, call.read(self.axis))
        call.write(self.axis, state_BSR)
        return y_BSO


class LayerCall:
    """What the adapters of one decoder layer share while it runs, and no longer.

    Args:
        dropout_seeds_B: int64, one for each row; None draws them when they are first asked for.
        state_BSAR: as it enters the layer; its axes are read and written one by one. None for plain LoRA.
        first_token: where the first of the tokens stands in its row, for the dropout.
    """

    def __init__(
        self,
        dropout_seeds_B: Tensor | None = None,
        state_BSAR: Tensor | None = None,
        first_token: int = 0,
    ) -> None:
        self.first_token = first_token
        self._seeds_B = dropout_seeds_B
        self._columns = [] if state_BSAR is None else list(state_BSAR.unbind(2))
        self._read_BSD: Tensor | None = None
        self._through_BSD: Tensor | None = None
        self._z: dict[LoRALinear, Tensor] = {}

    def dropout_seeds(self, num_rows: int, device: torch.device) -> Tensor:
        """The seeds [B] of this call's rows, on `device`."""
        seeds_B = self._seeds_B
        self._seeds_B = draw_seeds(num_rows, device) if seeds_B is None else seeds_B.to(device)
        return self._seeds_B

    def read(self, axis: int) -> Tensor:
        """State [B,S,R] of one axis."""
        return self._columns[axis]

    def write(self, axis: int, state_BSR: Tensor) -> None:
        """Hands on the state of one axis, rounded to the dtype in which the state entered."""
        self._columns[axis] = state_BSR.to(self._columns[axis].dtype)

    def packed(self) -> Tensor:
        """[B,S,A,R], to leave the layer."""
        return torch.stack(self._columns, dim=2)

    def down_project(self, module: LoRALinear, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """x, to be given to the base layer, and z [B,S,R]; one product for all of the module's `readers`."""
        if self._read_BSD is not x_BSD or module not in self._z:
            weights = [reader.lora_A.weight for reader in module.readers]
            self._read_BSD = x_BSD
            self._through_BSD, z = fused.down_project(x_BSD, weights)
            self._z = dict(zip(module.readers, z, strict=True))
        assert self._through_BSD is not None
        through_BSD, z_BSR = self._through_BSD, self._z.pop(module)
        if not self._z:
            self._read_BSD = self._through_BSD = None
        return through_BSD, z_BSR


class _Running(threading.local):
    """The innermost decoder layer that runs in this thread: its adapters, and what they share."""

    def __init__(self) -> None:
        self.adapters: Sequence[LoRALinear] = ()
        self.call: LayerCall | None = None


# Not on the modules, which all threads share; not in a context variable, which torch.compile cannot trace.
running = _Running()
