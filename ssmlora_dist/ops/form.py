"""A form of the inter-layer state: all that the rest of the package knows of one.

Shapes: B batch, S tokens, A time axes, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ssmlora_dist.ops import operators  # noqa: F401 (registers torch.ops.ssmlora)
from ssmlora_dist.ops.dropout import Dropout

Parameters = Mapping[str, Tensor]
Drop = Callable[[Tensor], Tensor]
Gradients = tuple[Tensor, Tensor, Tensor | None, list[Tensor]]


class Inputs(NamedTuple):
    """What `Form.forward` and `Form.backward` are given.

    Attributes:
        z: x W_a [B,S,R], in the dtype of the layer.
        state: received, in the dtype between layers; None for a form without one.
        parameters: by name.
        scaling: of the output, for forms with `scales_in_forward`.
        seeds: of the dropout, int32, one for each token [B,S]; None keeps everything.
        dropout: which adapter drops, and with what probability.
    """

    z: Tensor
    state: Any
    parameters: Parameters
    scaling: float
    seeds: Tensor | None
    dropout: Dropout

    def mask(self) -> Tensor | None:
        """K [B,S,R]: 1 / (1 - p) where a component is kept, 0 where it is dropped; None keeps everything."""
        if self.seeds is None:
            return None
        ones = torch.ones_like(self.z, dtype=state_dtype(self.z.dtype))
        kept: Tensor = torch.ops.ssmlora.dropout(ones, self.seeds, *self.dropout)
        return kept


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of state arithmetic: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an adapter computes between its two matrices: y = x W_0 + scaling u W_b, u from z = x W_a.

    A form of your own is a frozen dataclass under this one: a `name`, `start_values` and `step`, and
    `register_form`. Its fields are its settings: `carry`, `normalization` and `state_input_scale` are filled
    from the adapter's configuration, others from its `form_settings`; `__post_init__` may refuse a value with
    a ValueError.

    `step` is the truth, and enough to train well: in the forward pass it runs without a graph, of which z,
    the state received and the parameters are kept, and once more in the backward pass. A faster path
    overrides both `forward` and `backward`.

    Args:
        rank: R.
        axis: which of the state's axes is the adapter's own.
        num_axes: A.

    Attributes:
        name: in configurations and adapter files.
        has_state: whether anything is received and handed on; if not, `step` is given None and returns None.
        reads_all_axes: `step` receives [B,S,A,R], not its own axis [B,S,R]; that alone is handed on.
        drops_input: dropout acts on x, and not in `step`.
        is_mergeable: u = z: the adapter is a plain LoRA, to PEFT as well.
        figures: names of what `measure` measures.
        scales_in_forward: the u of `forward` and `backward` is multiplied by scaling already.
    """

    rank: int
    axis: int = 0
    num_axes: int = 1

    name: ClassVar[str]
    has_state: ClassVar[bool] = True
    reads_all_axes: ClassVar[bool] = False
    drops_input: ClassVar[bool] = False
    is_mergeable: ClassVar[bool] = False
    figures: ClassVar[tuple[str, ...]] = ()
    scales_in_forward: ClassVar[bool] = False

    def start_values(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The parameters beyond LoRA's as they start, by name; names begin with `state_`.

        `lora_B` starts at zeros, so every form starts as the base model.

        Args:
            generator: of what is drawn at random, on the CPU.
        """
        return {}

    def step(self, z: Tensor, state: Any, parameters: Parameters, drop: Drop) -> tuple[Tensor, Tensor | None]:
        """u [B,S,R] and the state handed on [B,S,R], differentiable in all tensors.

        All are float32 (float64 under a float64 layer), under autocast too; what comes back is rounded to
        the dtypes of the layer and of the state between layers.

        Args:
            z: x W_a, [B,S,R].
            state: received, see `reads_all_axes`; zeros at the first adapter of an axis.
            parameters: by the names of `start_values`.
            drop: dropout of a [B,S,R]; called twice, it drops the same components.
        """
        raise NotImplementedError

    def measure(self, z: Tensor, state: Any, parameters: Parameters) -> tuple[Tensor, ...]:
        """For each of `figures` its value at every token [B,S]; the arguments are those of `step`."""
        return ()

    def run(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """`step` in the dtype of state arithmetic, and what comes of it in the dtypes of z and the state."""
        z, state, mask = inputs.z, inputs.state, inputs.mask()
        wide = state_dtype(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            u, handed_on = self.step(
                z.to(wide),
                None if state is None else state.to(wide),
                {name: parameter.to(wide) for name, parameter in inputs.parameters.items()},
                lambda tensor: tensor if mask is None else tensor * mask,
            )
        return u.to(z.dtype), None if handed_on is None else handed_on.to(state.dtype)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """What `run` gives, without a graph."""
        return self.run(inputs)

    def backward(
        self, inputs: Inputs, d_u: Tensor, d_handed_on: Tensor | None, needs_d_state: bool
    ) -> Gradients:
        """u again, and the gradients of z, of the state received (where needed) and of each parameter.

        Args:
            inputs: as `forward` was given them.
            d_u: the gradient of u.
            d_handed_on: of the state handed on; None if nothing depends on it.
            needs_d_state: whether anything takes that of the state received.
        """
        with torch.enable_grad():
            z, *rest = (
                tensor.detach().requires_grad_() for tensor in (inputs.z, *inputs.parameters.values())
            )
            state = inputs.state
            if state is not None:
                state = state.detach().requires_grad_(needs_d_state)
            parameters = dict(zip(inputs.parameters, rest, strict=True))
            again = self.run(inputs._replace(z=z, state=state, parameters=parameters))
            pairs = [
                (output, gradient)
                for output, gradient in zip(again, (d_u, d_handed_on), strict=True)
                if output is not None and output.requires_grad and gradient is not None
            ]
            outputs, gradients = zip(*pairs, strict=True)
            takers = [z, *([state] if needs_d_state else []), *rest]
            d_z, *others = torch.autograd.grad(outputs, takers, gradients, materialize_grads=True)
        return again[0].detach(), d_z, others.pop(0) if needs_d_state else None, others
