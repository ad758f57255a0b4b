"""The decoder layer as a function (hidden, state) -> (hidden, state): the state contract of DESIGN section 3.

Shapes: B batch, S tokens, D hidden size, A time axes, R rank. `wrap_stateful_layer` makes such a function of
a decoder layer, in place. Between layers the pair is the tuple (hidden [B,S,D], state [B,S,A,R]), handed from
each layer to the next by the model's own loop; the first layer receives the bare hidden states and starts the
state at zeros, the last returns the bare hidden states. The state is therefore among the inputs and outputs
of whatever calls a layer, gradient checkpointing above all: there is no side holder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.layers import AdapterModule, LayerCall, running
from ssmlora_dist.adapters.mixing import mix_in, unmix
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops.dropout import draw_seeds


@contextmanager
def layer_context(adapters: Sequence[AdapterModule], call: LayerCall | None) -> Iterator[None]:
    """Lets `adapters` share `call` in this thread, for the length of the body; None disables them."""
    outer = running.adapters, running.call
    running.adapters, running.call = adapters, call
    try:
        yield
    finally:
        running.adapters, running.call = outer


@contextmanager
def disabled_adapters(model: nn.Module) -> Iterator[None]:
    """Lets `model` compute as its base model in the body, bit for bit; in this thread, and in no other.

    A pass that begins in the body is recomputed without adapters too, and one that began outside of it with
    them, wherever the backward pass runs, under the model's own gradient checkpointing.

    Args:
        model: adapted, by itself or within something that wraps it.

    Raises:
        AdapterError: it carries no adapter.
    """
    own = frozenset(m for m in model.modules() if isinstance(m, (AdapterModule, AdaptedDecoderLayer)))
    if not own:
        raise AdapterError("the model carries no adapter; call add_adapters first")
    outer = running.disabled
    running.disabled = outer | own
    try:
        yield
    finally:
        running.disabled = outer


class AdaptedDecoderLayer(nn.Module):
    """Mixed into a decoder layer's class by `wrap_layer`; never made directly.

    Attributes:
        adapters: the adapters inside the layer.
    """

    adapters: list[AdapterModule]

    def __call__(self, hidden: Any, *args: Any, dropout_seeds: Tensor | None = None, **kwargs: Any) -> Any:
        """`forward`, for which seeds of the dropout are drawn if none are given.

        Here, outside of checkpointing: a recompute is given them as well. Drawn anew, they would depend on
        torch's generator, which other threads use meanwhile. So it is told whether adapters are disabled.
        """
        if self in running.disabled:
            return super().__call__(hidden, *args, disabled=True, **kwargs)
        if dropout_seeds is None and self.training and any(adapter.dropout for adapter in self.adapters):
            hidden_BSD = hidden[0] if isinstance(hidden, tuple) else hidden
            dropout_seeds = draw_seeds(hidden_BSD.shape[:2], hidden_BSD.device)
        return super().__call__(hidden, *args, dropout_seeds=dropout_seeds, **kwargs)

    def forward(
        self,
        hidden: Any,
        *args: Any,
        dropout_seeds: Tensor | None = None,
        disabled: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As without adapters; `dropout_seeds` [B,S] int32, one for each token, decide what is dropped.

        Without them a layer that drops draws its own. If `disabled`, the base model's layer computes.
        """
        call = None if disabled else LayerCall(hidden.shape[:2], dropout_seeds)
        with layer_context(self.adapters, call):
            return super().forward(hidden, *args, **kwargs)


class StatefulDecoderLayer(AdaptedDecoderLayer):
    """Mixed into a decoder layer's class by `wrap_stateful_layer`; never made directly.

    Attributes:
        num_axes, rank: A and R of the state.
        state_dtype: dtype of the state between layers; None takes that of the hidden states.
        is_last: returns the hidden states alone.
        receives_packed, sends_packed: the layer begins or ends a pipeline stage: see `pack`.
    """

    num_axes: int
    rank: int
    state_dtype: torch.dtype | None
    is_last: bool
    receives_packed: bool
    sends_packed: bool

    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any layer.

        Raises:
            AdapterError: the layer is checkpointed in a way that does not see the state.
        """
        if self.training and getattr(self, "gradient_checkpointing", False) and self not in running.disabled:
            settings = getattr(self._gradient_checkpointing_func, "keywords", {})
            if settings.get("use_reentrant"):
                raise AdapterError(
                    "reentrant gradient checkpointing gives no gradients to adapters with a state; enable it "
                    'with `gradient_checkpointing_kwargs={"use_reentrant": False}`'
                )
        return super().__call__(hidden, *args, **kwargs)

    def forward(
        self,
        hidden: Any,
        *args: Any,
        dropout_seeds: Tensor | None = None,
        disabled: bool = False,
        **kwargs: Any,
    ) -> Any:
        """(hidden [B,S,D], state [B,S,A,R]) -> the same; bare hidden states at the first and last layer.

        If `disabled`, there is no state: bare hidden states at every layer.
        """
        if disabled:
            return super().forward(hidden, *args, disabled=True, **kwargs)
        if isinstance(hidden, tuple):
            hidden_BSD, state_BSAR = hidden
        elif self.receives_packed:
            hidden_BSD, state_BSAR = unpack(hidden, self.num_axes, self.rank)
        else:
            hidden_BSD, state_BSAR = hidden, self.initial_state(hidden)
        call = LayerCall(hidden_BSD.shape[:2], dropout_seeds, state_BSAR)
        with layer_context(self.adapters, call):
            hidden_BSD = super(AdaptedDecoderLayer, self).forward(hidden_BSD, *args, **kwargs)
        if not isinstance(hidden_BSD, Tensor):
            raise AdapterError(
                f"{type(self).__name__} returns a {type(hidden_BSD).__name__}, and not the hidden states "
                "alone, so no state can be handed on beside them; choose an adapter without a state, such as "
                '"lora"'
            )
        if self.is_last:
            return hidden_BSD
        return pack(hidden_BSD, call.packed()) if self.sends_packed else (hidden_BSD, call.packed())

    def initial_state(self, hidden_BSD: Tensor) -> Tensor:
        """Zeros [B,S,A,R] for hidden states [B,S,D]."""
        shape = (*hidden_BSD.shape[:2], self.num_axes, self.rank)
        return hidden_BSD.new_zeros(shape, dtype=self.state_dtype or hidden_BSD.dtype)


def pack(hidden_BSD: Tensor, state_BSAR: Tensor) -> Tensor:
    """[B,S,D + A R] of one dtype: what a pipeline stage sends to the next."""
    assert hidden_BSD.dtype == state_BSAR.dtype, "refused by config.topology"
    return torch.cat([hidden_BSD, state_BSAR.flatten(2)], dim=-1)


def unpack(packed_BSW: Tensor, num_axes: int, rank: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`: hidden [B,S,D] and state [B,S,A,R]."""
    width = num_axes * rank
    hidden_BSD, state_BSW = packed_BSW.split([packed_BSW.shape[-1] - width, width], dim=-1)
    return hidden_BSD, state_BSW.unflatten(-1, (num_axes, rank))


def join_stages(layers: Iterable[nn.Module], hidden_size: int, is_first: bool, is_last: bool) -> int:
    """Makes the ends of a pipeline stage's layers receive and send packed tensors; returns their width W.

    Args:
        layers: of the stage, in order.
        hidden_size: D.
        is_first: the stage begins the model.
        is_last: the stage ends the model.
    """
    ordered = list(layers)
    first, last = ordered[0], ordered[-1]
    # Without a form that has a state, hidden states cross the boundary as they are.
    if not isinstance(first, StatefulDecoderLayer) or not isinstance(last, StatefulDecoderLayer):
        return hidden_size
    first.receives_packed, last.sends_packed = not is_first, not is_last
    return hidden_size + first.num_axes * first.rank


def wrap_stateful_layer(
    layer: nn.Module, *, num_axes: int, rank: int, state_dtype: torch.dtype | None, is_last: bool
) -> None:
    """Makes a stateful layer of one with adapters, in place.

    Args:
        layer: a decoder layer whose `forward` takes the hidden states first and returns them alone.
        num_axes: A.
        rank: R.
        state_dtype: dtype of the state between layers; None takes that of the hidden states.
        is_last: whether the state ends here.
    """
    attributes = {
        "num_axes": num_axes,
        "rank": rank,
        "state_dtype": state_dtype,
        "is_last": is_last,
        "receives_packed": False,
        "sends_packed": False,
    }
    for name, value in attributes.items():
        setattr(layer, name, value)
    wrap_layer(layer, StatefulDecoderLayer)


def wrap_layer(layer: nn.Module, mixin: type[AdaptedDecoderLayer] = AdaptedDecoderLayer) -> None:
    """Makes a layer call its adapters in `layer_context`, in place; names and `isinstance` checks stay."""
    mix_in(layer, mixin)
    list_adapters(layer)


def list_adapters(layer: nn.Module) -> None:
    """Has a wrapped layer know the adapters that are inside it now."""
    adapters = [module for module in layer.modules() if isinstance(module, AdapterModule)]
    setattr(layer, "adapters", adapters)  # noqa: B010 (not a submodule)


def unwrap_layer(layer: nn.Module) -> None:
    """Undoes `wrap_layer` and `wrap_stateful_layer`, in place; the adapters themselves stay.

    Raises:
        AdapterError: something else has changed the layer's class since.
    """
    unmix(layer)
    for name in (*AdaptedDecoderLayer.__annotations__, *StatefulDecoderLayer.__annotations__):
        vars(layer).pop(name, None)
