"""Adapters on one frozen linear layer, dense or quantised.

Shapes: B batch, S tokens, D in-features, O out-features, R rank. Adapter parameters are float32 (float64
under a float64 layer) whatever the layer's storage; products run in the dtype of the input.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmlora_dist.adapters.config import scaling_of
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops import fused
from ssmlora_dist.ops.dropout import Dropout, draw_seeds
from ssmlora_dist.ops.form import Form, state_dtype


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of what is trained in the place of, or beside, a weight of the base model."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class AdapterModule(nn.Module):
    """In the place of a module of the base model, its `base_layer`, with trained parameters beside that."""

    base_layer: nn.Module
    dropout = 0.0

    @property
    def is_disabled(self) -> bool:
        """Whether the base layer alone computes: see `state.disabled_adapters`."""
        return running.call is None if self in running.adapters else self in running.disabled

    def follow_base_layer(self) -> None:
        """Moves what is trained to the device of the base layer, which stays as it is."""
        device = next(self.base_layer.parameters()).device
        for name, child in self.named_children():
            if name != "base_layer":
                child.to(device)
        self._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]


class LoRALinear(AdapterModule):
    """y = x W_0 + scaling * u W_b, where a form makes u, and the state handed on, of z = x W_a.

    `step` is the pure function, state in and state out. A decoder layer calls its projection with the input
    alone, so `forward` reads and writes the state of its layer's context, a `LayerCall`, for the length of
    its own call (`adapters.state`).

    Args:
        base_layer: the frozen layer; anything with `in_features`, `out_features` and `weight`.
        form: what is computed between W_a and W_b; it says the rank, and which axis of the state is its own.
        alpha: the adapter's output is scaled by alpha / rank.
        rslora: by alpha / sqrt(rank) instead.
        dropout: probability while training, of what the form says: its input, or the state.
        dropout_id: tells the adapter's dropout from that of all others in the model.
        detach_state: stops gradients through the state received, hence into earlier adapters.
        hands_on: whether the next adapter of the axis receives anything; if not, all receive zeros.

    Attributes:
        readers: the adapters that read the same input in every call, this one among them.
    """

    base_layer: nn.Linear

    def __init__(
        self,
        base_layer: nn.Linear,
        form: Form,
        alpha: float,
        dropout: float = 0.0,
        *,
        rslora: bool = False,
        dropout_id: int = 0,
        detach_state: bool = False,
        hands_on: bool = True,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.form, self.rank, self.scaling = form, form.rank, scaling_of(alpha, form.rank, rslora)
        self.dropout, self.dropout_id = dropout, dropout_id
        self.detach_state, self.hands_on = detach_state, hands_on
        device, dtype = base_layer.weight.device, adapter_dtype(base_layer.weight)
        self.lora_A = nn.Linear(self.in_features, self.rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(self.rank, self.out_features, bias=False, device=device, dtype=dtype)
        start = form.start_values()
        self.parameter_names = tuple(start)
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(self.lora_A.weight.new_empty(value.shape)))
        self.readers: list[LoRALinear] = [self]

    @property
    def call(self) -> LayerCall | None:
        """What the adapters of the decoder layer share, while it runs in this thread."""
        return running.call if self in running.adapters else None

    @property
    def drops_input(self) -> bool:
        """Whether `lora_A` reads another tensor than the base layer while training."""
        return self.dropout > 0 and self.form.drops_input

    @property
    def form_parameters(self) -> dict[str, Tensor]:
        """The parameters beyond LoRA's, by name."""
        return {name: getattr(self, name) for name in self.parameter_names}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws `lora_A` (Kaiming uniform, a = sqrt 5), on the CPU for all devices alike; `lora_B` = 0.

        The form's parameters get its start values.
        """
        drawn = torch.empty(self.lora_A.weight.shape, dtype=self.lora_A.weight.dtype)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.weight.copy_(drawn)
            self.lora_B.weight.zero_()
            for name, value in self.form.start_values(generator).items():
                self.get_parameter(name).copy_(value)

    def step(self, x_BSD: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """([B,S,D], state) -> ([B,S,O], state [B,S,R] in the dtype of the state received); pure.

        Args:
            x_BSD: the input of the base layer.
            state: [B,S,R], or [B,S,A,R] for a form that reads all axes; None for one without a state.
        """
        x_BSD, z_BSR = self._down_project(x_BSD)
        base_BSO, is_ours = self._frozen(x_BSD)
        return fused.add_delta(
            base_BSO,
            # Under autocast a quantised layer gives another dtype than the product with `lora_A`.
            z_BSR.to(base_BSO.dtype),
            state.detach() if state is not None and self.detach_state else state,
            self.lora_B.weight,
            self.form,
            self.form_parameters,
            self.scaling,
            None if self.form.drops_input else self._dropout_seeds(x_BSD),
            self._dropout,
            is_ours,
        )

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B,S,D] -> [B,S,O] in the dtype of the base layer's output; [B S,D] -> [B S,O] alike.

        Raises:
            AdapterError: a form with a state is called outside such a layer (`step` is the function for
                that), or not with all of its tokens.
        """
        if self.is_disabled:
            output_BSO: Tensor = self.base_layer(x_BSD)
            return output_BSO
        call = self.call
        if x_BSD.dim() == 2 and call is not None and (self.form.has_state or self.dropout):
            return self._adapted(call.by_row(x_BSD), call).flatten(0, 1)
        return self._adapted(x_BSD, call)

    def _adapted(self, x_BSD: Tensor, call: LayerCall | None) -> Tensor:
        if not self.form.has_state:
            return self.step(x_BSD)[0]
        if call is None:
            raise AdapterError(
                "an adapter with a state was called outside of its decoder layer, so it has none; "
                "call the decoder layer, or `step(x, state)`"
            )
        y_BSO, state_BSR = self.step(x_BSD, call.read(self.form))
        if self.hands_on and state_BSR is not None:
            call.write(self.form.axis, state_BSR)
        return y_BSO

    @torch.no_grad()
    def form_inputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z [B,S,R] and the state received, as `Form.step` takes them when `forward` is called with x.

        For those who watch an adapter with a state, within its decoder layer.
        """
        assert self.call is not None
        x_BSD = self.call.by_row(x)
        z_BSR = F.linear(x_BSD, self.lora_A.weight.to(x_BSD.dtype))
        wide = state_dtype(z_BSR.dtype)
        return z_BSR.to(wide), self.call.read(self.form).to(wide)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"form={self.form.name}, rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"

    def _down_project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """x, to be given to the base layer, and z [B,S,R]."""
        # ZeRO 3 hands each module an input of its own, and gathers its weights for the time of its own call.
        call = self.call
        if call is not None and len(self.readers) > 1 and not hasattr(self.lora_A.weight, "ds_id"):
            return call.down_project(self, x_BSD)
        seeds = self._dropout_seeds(x_BSD) if self.drops_input else None
        x_BSD, (z_BSR,) = fused.down_project(x_BSD, [self.lora_A.weight], seeds, *self._dropout)
        return x_BSD, z_BSR

    def _frozen(self, x_BSD: Tensor) -> tuple[Tensor, bool]:
        """The base layer's output, and whether it may be lost."""
        base_BSO = self.base_layer(x_BSD)
        witness: list[None] = []
        is_ours = not fused.is_held(base_BSO, witness)
        return base_BSO, is_ours

    @property
    def _dropout(self) -> Dropout:
        return Dropout(self.dropout_id, self.dropout)

    def _dropout_seeds(self, x_BSD: Tensor) -> Tensor | None:
        """[B,S]; None where nothing is dropped."""
        if not self.training or not self.dropout:
            return None
        call = self.call or LayerCall(x_BSD.shape[:-1])
        return call.dropout_seeds(x_BSD.device)


class LayerCall:
    """What the adapters of one decoder layer share while it runs, and no longer.

    Args:
        shape: B and S.
        dropout_seeds_BS: int32, one for each token; None draws them when they are first asked for.
        state_BSAR: as it enters the layer; its axes are written one by one. None without any.

    Raises:
        AdapterError: not one seed for each token.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dropout_seeds_BS: Tensor | None = None,
        state_BSAR: Tensor | None = None,
    ) -> None:
        if dropout_seeds_BS is not None and dropout_seeds_BS.shape != torch.Size(shape):
            raise AdapterError(
                f"dropout_seeds: shape {list(dropout_seeds_BS.shape)} given; allowed: {list(shape)}, one "
                "int32 for each token; make those of a sample with `ops.dropout.token_seeds`"
            )
        self.shape = shape
        self._seeds_BS = dropout_seeds_BS
        self._columns = [] if state_BSAR is None else list(state_BSAR.unbind(2))
        self._read_BSD: Tensor | None = None
        self._through_BSD: Tensor | None = None
        self._z: dict[LoRALinear, Tensor] = {}
        self._flat: Tensor | None = None
        self._by_row: Tensor | None = None

    def by_row(self, x: Tensor) -> Tensor:
        """[B S,D], as a decoder layer may flatten what it works on, -> [B,S,D]; the same tensor for the same.

        Raises:
            AdapterError: these are not all tokens of the layer.
        """
        if x.dim() > 2:
            return x
        if self._flat is not x:
            if x.shape[0] != self.shape[0] * self.shape[1]:
                raise AdapterError(
                    f"an adapter with a state or with dropout was called with {x.shape[0]} tokens, where "
                    f"its decoder layer has {self.shape[0]} x {self.shape[1]}: which ones these are is not "
                    "known; leave this projection out of the adapter's targets"
                )
            self._flat, self._by_row = x, x.unflatten(0, (self.shape[0], self.shape[1]))
        assert self._by_row is not None
        return self._by_row

    def dropout_seeds(self, device: torch.device) -> Tensor:
        """The seeds [B,S] of this call's tokens, on `device`."""
        seeds_BS = self._seeds_BS
        self._seeds_BS = draw_seeds(self.shape, device) if seeds_BS is None else seeds_BS.to(device)
        return self._seeds_BS

    def read(self, form: Form) -> Tensor:
        """The state that a form receives: [B,S,R] of its axis, or of all axes [B,S,A,R]."""
        return self.packed() if form.reads_all_axes else self._columns[form.axis]

    def write(self, axis: int, state_BSR: Tensor) -> None:
        """Hands on the state of one axis, rounded to the dtype in which the state entered."""
        self._columns[axis] = state_BSR.to(self._columns[axis].dtype)

    def packed(self) -> Tensor:
        """[B,S,A,R], to leave the layer."""
        return torch.stack(self._columns, dim=2)

    def replace_state(self, state_BSAR: Tensor) -> None:
        """Hands on the state of all axes."""
        self._columns = list(state_BSAR.unbind(2))

    def tile(self, first: int, num_tokens: int, state_BTAR: Tensor | None) -> LayerCall:
        """What the adapters share for `num_tokens` of every row, from token `first` on."""
        seeds_BS = self._seeds_BS
        seeds_BT = None if seeds_BS is None else seeds_BS[:, first : first + num_tokens]
        return LayerCall((self.shape[0], num_tokens), seeds_BT, state_BTAR)

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
    """What runs in this thread.

    Attributes:
        adapters: of the innermost decoder layer that runs.
        call: what they share; None while they are disabled.
        disabled: decoder layers and adapters that compute as the base model, wherever they are called.
    """

    def __init__(self) -> None:
        self.adapters: Sequence[AdapterModule] = ()
        self.call: LayerCall | None = None
        self.disabled: frozenset[nn.Module] = frozenset()


# Not on the modules, which all threads share; not in a context variable, which torch.compile cannot trace.
running = _Running()
