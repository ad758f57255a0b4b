"""Random time modules in float64, and chains of them along depth, for the tests of `ops`.

Shapes: B batch, S tokens, D features in and out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmlora_dist.ops.reference import time_module

BATCH, TOKENS, FEATURES, RANK = 1, 3, 5, 4
SCALING = 1.5
DROPOUT = 0.4
SEED = 5
# gradcheck moves inputs by 1e-6; an arg-min or arg-max that changes on the way would break its differences.
SMALLEST_GAP = 1e-3


@dataclass
class Module:
    """One time module: frozen weight and four matrices, with its dropout mask."""

    frozen_DO: Tensor
    lora_A_RD: Tensor
    lora_B_OR: Tensor
    transition_RR: Tensor
    input_RR: Tensor
    mask_BSR: Tensor | None

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lora_A_RD, self.lora_B_OR, self.transition_RR, self.input_RR


def random_modules(count: int, *, dropout: bool, seed: int = SEED) -> tuple[Tensor, Tensor, list[Module]]:
    """Input [B,S,D], state [B,S,R] and `count` modules; all leaves that need gradients, masks aside."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    x_BSD, h_prev_BSR = draw(BATCH, TOKENS, FEATURES), draw(BATCH, TOKENS, RANK)
    modules = []
    for _ in range(count):
        kept = torch.rand(BATCH, TOKENS, RANK, generator=generator, dtype=torch.float64) >= DROPOUT
        modules.append(
            Module(
                frozen_DO=draw(FEATURES, FEATURES, scale=0.4).detach(),
                lora_A_RD=draw(RANK, FEATURES, scale=0.5),
                lora_B_OR=draw(FEATURES, RANK, scale=0.5),
                transition_RR=draw(RANK, RANK, scale=0.5),
                input_RR=draw(RANK, RANK, scale=0.7),
                mask_BSR=kept / (1 - DROPOUT) if dropout else None,
            )
        )
    return x_BSD, h_prev_BSR, modules


def run(
    module: Module, x_BSD: Tensor, h_prev_BSR: Tensor, *, normalization: str, carry: str, detach_state: bool
) -> tuple[Tensor, Tensor]:
    """y [B,S,D] and the carried state [B,S,R] of one module."""
    return time_module(
        x_BSD,
        x_BSD @ module.frozen_DO,
        h_prev_BSR,
        *module.matrices,
        scaling=SCALING,
        normalization=normalization,
        carry=carry,
        detach_state=detach_state,
        dropout_mask_BSR=module.mask_BSR,
    )


def run_chain(
    modules: Sequence[Module],
    x_BSD: Tensor,
    h_prev_BSR: Tensor,
    *,
    normalization: str,
    carry: str,
    detach_state: bool,
    received: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Modules on one axis, a tanh between them, as layers between projections.

    Args:
        modules: along depth.
        x_BSD: input of the first.
        h_prev_BSR: state received by the first.
        normalization, carry, detach_state: as for `time_module`.
        received: states that the modules receive in place of those handed on; constants.

    Returns:
        y of the last module, and the state that each handed on.
    """
    carried: list[Tensor] = []
    state_BSR = h_prev_BSR
    for depth, module in enumerate(modules):
        if received is not None:
            state_BSR = received[depth]
        y_BSD, state_BSR = run(
            module, x_BSD, state_BSR, normalization=normalization, carry=carry, detach_state=detach_state
        )
        carried.append(state_BSR)
        x_BSD = y_BSD.tanh()
    return y_BSD, carried


def assert_away_from_ties(states: Sequence[Tensor]) -> None:
    """Least and largest of every row are apart from the others by `SMALLEST_GAP`."""
    for state_BSR in states:
        gaps = state_BSR.detach().sort(-1).values.diff(dim=-1)
        assert torch.minimum(gaps[..., 0], gaps[..., -1]).min() > SMALLEST_GAP, "draw another seed"
