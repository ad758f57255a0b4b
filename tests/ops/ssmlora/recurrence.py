"""Random time modules in float64, and chains of them along depth, for the tests of `ops`.

Shapes: B batch, S tokens, D features in and out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssmlora_dist.ops.ssmlora.reference import time_module

BATCH, TOKENS, FEATURES, RANK = 1, 3, 5, 4
SCALING = 1.5
DROPOUT = 0.4
SEED = 5
# gradcheck moves inputs by 1e-6; an arg-min or arg-max that changes on the way would break its differences.
SMALLEST_GAP = 1e-3


@dataclass(frozen=True)
class Options:
    """What the recurrence can be asked for."""

    normalization: str = "minmax"
    carry: str = "normalized"
    detach_state: bool = False


@dataclass(frozen=True)
class Module:
    """One time module: its frozen weight, its four matrices, its dropout mask."""

    frozen_DD: Tensor
    lora_A_RD: Tensor
    lora_B_DR: Tensor
    transition_RR: Tensor
    input_RR: Tensor
    mask_BSR: Tensor | None

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.lora_A_RD, self.lora_B_DR, self.transition_RR, self.input_RR

    def run(self, x_BSD: Tensor, h_prev_BSR: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        """y [B,S,D] and the state [B,S,R] handed on."""
        return time_module(
            x_BSD,
            x_BSD @ self.frozen_DD,
            h_prev_BSR,
            *self.matrices,
            scaling=SCALING,
            normalization=options.normalization,
            carry=options.carry,
            detach_state=options.detach_state,
            dropout_mask_BSR=self.mask_BSR,
        )


@dataclass(frozen=True)
class Chain:
    """Time modules on one axis along depth, with a tanh between them where layers would be."""

    modules: Sequence[Module]

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        return tuple(matrix for module in self.modules for matrix in module.matrices)

    def with_matrices(self, matrices: Sequence[Tensor]) -> Chain:
        names = ("lora_A_RD", "lora_B_DR", "transition_RR", "input_RR")
        return Chain(
            [
                replace(module, **dict(zip(names, matrices[4 * i : 4 * i + 4], strict=True)))
                for i, module in enumerate(self.modules)
            ]
        )

    def run(
        self, x_BSD: Tensor, h_prev_BSR: Tensor, options: Options, received: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """y of the last module, and the state each module hands on.

        Args:
            x_BSD: input of the first module.
            h_prev_BSR: state received by the first module.
            options: of the recurrence.
            received: constants that the modules receive in place of the states handed on.
        """
        states = [h_prev_BSR]
        for depth, module in enumerate(self.modules):
            h_prev_BSR = received[depth] if received else states[-1]
            y_BSD, state_BSR = module.run(x_BSD, h_prev_BSR, options)
            states.append(state_BSR)
            x_BSD = y_BSD.tanh()
        return y_BSD, states[1:]


def random_chain(num_modules: int, *, dropout: bool, seed: int = SEED) -> tuple[Tensor, Tensor, Chain]:
    """Input [B,S,D], received state [B,S,R] and a chain; all of them need gradients."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def mask() -> Tensor:
        kept = torch.rand(BATCH, TOKENS, RANK, generator=generator, dtype=torch.float64) >= DROPOUT
        return kept / (1 - DROPOUT)

    x_BSD, h_prev_BSR = draw(BATCH, TOKENS, FEATURES), draw(BATCH, TOKENS, RANK)
    modules = [
        Module(
            frozen_DD=draw(FEATURES, FEATURES, scale=0.4).detach(),
            lora_A_RD=draw(RANK, FEATURES, scale=0.5),
            lora_B_DR=draw(FEATURES, RANK, scale=0.5),
            transition_RR=draw(RANK, RANK, scale=0.5),
            input_RR=draw(RANK, RANK, scale=0.7),
            mask_BSR=mask() if dropout else None,
        )
        for _ in range(num_modules)
    ]
    return x_BSD, h_prev_BSR, Chain(modules)


def assert_away_from_ties(states: Sequence[Tensor]) -> None:
    """Least and largest of every row are apart from the others by `SMALLEST_GAP`."""
    for state_BSR in states:
        gaps = state_BSR.detach().sort(-1).values.diff(dim=-1)
        assert torch.minimum(gaps[..., 0], gaps[..., -1]).min() > SMALLEST_GAP, "draw another seed"


def weights_like(output: Tensor) -> Tensor:
    """Fixed weights for a sum of `output`, to serve as its gradient."""
    generator = torch.Generator().manual_seed(output.shape[-1])
    return torch.randn(output.shape, generator=generator, dtype=output.dtype)
