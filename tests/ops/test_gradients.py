"""Gradients of the reference recurrence: against finite differences, and against the formulas of ops/README.md."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ssmlora_dist.ops.reference import EPSILON
from tests.ops.recurrence import (
    SCALING,
    Module,
    assert_away_from_ties,
    random_modules,
    run,
    run_chain,
)

# Both sides are float64 sums of at most some hundred terms of order 1, taken in different orders.
FLOAT64_TOLERANCE = 1e-12
CHAIN_LENGTH = 4

normalizations = pytest.mark.parametrize("normalization", ["minmax", "rms", "none"])
carries = pytest.mark.parametrize("carry", ["normalized", "raw"])
dropouts = pytest.mark.parametrize("dropout", [False, True], ids=["whole", "dropout"])
state_gradients = pytest.mark.parametrize("detach_state", [False, True], ids=["full", "detached"])


@normalizations
@carries
@dropouts
@state_gradients
def test_gradcheck_of_one_time_module(
    normalization: str, carry: str, dropout: bool, detach_state: bool
) -> None:
    x_BSD, h_prev_BSR, (module,) = random_modules(1, dropout=dropout)
    options = {"normalization": normalization, "carry": carry, "detach_state": detach_state}

    def outputs(x_BSD: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        *matrices, state_BSR = (*tensors, h_prev_BSR)[:5]
        return run(Module(module.frozen_DO, *matrices, module.mask_BSR), x_BSD, state_BSR, **options)

    assert_away_from_ties([outputs(x_BSD, *module.matrices, h_prev_BSR)[1]])
    # A detached state has no gradient to compare with a difference quotient, so it stays constant there.
    received = () if detach_state else (h_prev_BSR,)
    assert torch.autograd.gradcheck(outputs, (x_BSD, *module.matrices, *received))


@normalizations
@carries
@dropouts
def test_gradcheck_of_a_chain_of_four(normalization: str, carry: str, dropout: bool) -> None:
    x_BSD, h_prev_BSR, modules = random_modules(CHAIN_LENGTH, dropout=dropout)
    options = {"normalization": normalization, "carry": carry, "detach_state": False}
    assert_away_from_ties(run_chain(modules, x_BSD, h_prev_BSR, **options)[1])
    assert torch.autograd.gradcheck(*_chain_of(modules, x_BSD, (h_prev_BSR,), None, options))


@normalizations
@carries
@dropouts
def test_gradcheck_of_a_detached_chain_of_four(normalization: str, carry: str, dropout: bool) -> None:
    """Its gradient is that of the chain whose modules receive constants; differences see only those."""
    x_BSD, h_prev_BSR, modules = random_modules(CHAIN_LENGTH, dropout=dropout)
    options = {"normalization": normalization, "carry": carry, "detach_state": True}
    y_BSD, carried = run_chain(modules, x_BSD, h_prev_BSR, **options)
    assert_away_from_ties(carried)
    received = [state.detach() for state in (h_prev_BSR, *carried[:-1])]
    attached = options | {"detach_state": False}
    assert torch.autograd.gradcheck(*_chain_of(modules, x_BSD, (), received, attached))
    y_constant, carried_constant = run_chain(modules, x_BSD, h_prev_BSR, received=received, **attached)
    leaves = [x_BSD, *(matrix for module in modules for matrix in module.matrices)]
    gradients = _gradients((y_BSD, carried[-1]), leaves)
    expected = _gradients((y_constant, carried_constant[-1]), leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def _chain_of(modules: Sequence[Module], x: Tensor, state: tuple[Tensor, ...], received, options):  # type: ignore[no-untyped-def]
    """The chain as a function of its tensors alone, and those tensors: what gradcheck takes."""
    constant = torch.zeros_like(modules[0].lora_A_RD[0, 0]).expand(*x.shape[:2], len(modules[0].input_RR))

    def outputs(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        moved = [
            Module(module.frozen_DO, *tensors[4 * i : 4 * i + 4], module.mask_BSR)
            for i, module in enumerate(modules)
        ]
        first = tensors[-1] if state else constant
        y_BSD, carried = run_chain(moved, x, first, received=received, **options)
        return y_BSD, carried[-1]

    return outputs, (x, *(matrix for module in modules for matrix in module.matrices), *state)


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed weighted sum of the outputs."""
    total = sum((output * _weights(output)).sum() for output in outputs)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves, allow_unused=False))


def _weights(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.shape[-1])
    return torch.randn(output.shape, generator=generator, dtype=output.dtype)
