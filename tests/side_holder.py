"""The mistake that invariant I2 is there to catch: a state that goes from layer to layer beside the function.

`hold_state_aside` makes the decoder layers of an adapted model hand on the state through an attribute of an
object that they share. A forward pass computes the same numbers; a recompute finds what the last layer
left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssmlora_dist.adapters.layers import LayerCall
from ssmlora_dist.adapters.state import AdaptedDecoderLayer, StatefulDecoderLayer, layer_context
from ssmlora_dist.models import decoder_layers


class SideHolder:
    """Outlives the call of a layer, which is what is wrong with it.

    Attributes:
        state: [B,S,A,R], as the layer that ran last left it.
        detach: whether layers receive it without its graph.
    """

    def __init__(self, detach: bool) -> None:
        self.state: Tensor | None = None
        self.detach = detach


class SideHolderLayer(StatefulDecoderLayer):
    """Mixed into a decoder layer's class by `hold_state_aside`."""

    holder: SideHolder
    is_first: bool

    def forward(self, hidden_and_state: Any, *args: Any, **kwargs: Any) -> Any:
        """hidden [B,S,D] -> hidden [B,S,D]; the state is neither argument nor result."""
        hidden_BSD: Tensor = hidden_and_state
        held = None if self.is_first else self.holder.state
        if held is None:
            held = self.initial_state(hidden_BSD)
        call = LayerCall(held.shape[:2], state_BSAR=held.detach() if self.holder.detach else held)
        with layer_context(self.adapters, call):
            hidden_BSD = super(AdaptedDecoderLayer, self).forward(hidden_BSD, *args, **kwargs)
        self.holder.state = call.packed()
        return hidden_BSD


def hold_state_aside(model: Any, *, detach: bool) -> None:
    """Spoils an adapted model, in place."""
    holder = SideHolder(detach)
    for layer_idx, layer in decoder_layers(model).items():
        assert isinstance(layer, StatefulDecoderLayer)
        family_class = type(layer).__mro__[3]
        layer.__class__ = type("SideHolderDecoderLayer", (SideHolderLayer, family_class), {})
        layer.__dict__["holder"] = holder
        layer.__dict__["is_first"] = layer_idx == 0
