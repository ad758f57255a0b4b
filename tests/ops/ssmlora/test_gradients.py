"""Gradients of the reference: against finite differences, and against the formulas of its README.md."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ssmlora_dist.ops.ssmlora.reference import EPSILON
from tests.ops.ssmlora.recurrence import (
    SCALING,
    Chain,
    Module,
    Options,
    assert_away_from_ties,
    random_chain,
    weights_like,
)

# Both sides are float64 sums of at most some hundred terms of order 1, taken in different orders.
FLOAT64_TOLERANCE = 1e-12

normalizations = pytest.mark.parametrize("normalization", ["minmax", "rms", "none"])
carries = pytest.mark.parametrize("carry", ["normalized", "raw"])
dropouts = pytest.mark.parametrize("dropout", [False, True], ids=["no_dropout", "dropout"])
lengths = pytest.mark.parametrize("num_modules", [1, 4])


@normalizations
@carries
@dropouts
@lengths
def test_gradcheck(normalization: str, carry: str, dropout: bool, num_modules: int) -> None:
    x_BSD, h_prev_BSR, chain = random_chain(num_modules, dropout=dropout)
    options = Options(normalization, carry)
    assert_away_from_ties(chain.run(x_BSD, h_prev_BSR, options)[1])

    def outputs(x_BSD: Tensor, h_prev_BSR: Tensor, *matrices: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD, states = chain.with_matrices(matrices).run(x_BSD, h_prev_BSR, options)
        return y_BSD, states[-1]

    assert gradcheck(outputs, (x_BSD, h_prev_BSR, *chain.matrices))


@normalizations
@carries
@dropouts
@lengths
def test_gradcheck_detached(normalization: str, carry: str, dropout: bool, num_modules: int) -> None:
    """A detached gradient is that of modules which receive constants: differences must not move the state."""
    x_BSD, h_prev_BSR, chain = random_chain(num_modules, dropout=dropout)
    detached, attached = Options(normalization, carry, detach_state=True), Options(normalization, carry)
    y_BSD, states = chain.run(x_BSD, h_prev_BSR, detached)
    assert_away_from_ties(states)
    constants = [state.detach().clone() for state in (h_prev_BSR, *states[:-1])]

    def outputs(x_BSD: Tensor, *matrices: Tensor) -> tuple[Tensor, Tensor]:
        moved = chain.with_matrices(matrices)
        y_BSD, states = moved.run(x_BSD, h_prev_BSR, attached, received=constants)
        return y_BSD, states[-1]

    leaves = (x_BSD, *chain.matrices)
    assert gradcheck(outputs, leaves)
    expected = _gradients(outputs(*leaves), leaves)
    for gradient, wanted in zip(_gradients((y_BSD, states[-1]), leaves), expected, strict=True):
        assert torch.equal(gradient, wanted)
    received = torch.autograd.grad(
        chain.run(x_BSD, h_prev_BSR, detached)[0].sum(), h_prev_BSR, allow_unused=True
    )
    assert received == (None,)


@carries
@dropouts
@lengths
@pytest.mark.parametrize("detach_state", [False, True], ids=["full", "detached"])
def test_gradients_are_those_derived_by_hand(
    carry: str, dropout: bool, num_modules: int, detach_state: bool
) -> None:
    x_BSD, h_prev_BSR, chain = random_chain(num_modules, dropout=dropout)
    options = Options("minmax", carry, detach_state)
    y_BSD, states = chain.run(x_BSD, h_prev_BSR, options)
    state_leaf = () if detach_state else (h_prev_BSR,)
    leaves = (x_BSD, *chain.matrices, *state_leaf)
    gradients = _gradients((y_BSD, states[-1]), leaves)
    d_x, d_matrices, d_state = _by_hand(chain, x_BSD.detach(), h_prev_BSR.detach(), options)
    expected = [d_x, *d_matrices, *(() if detach_state else (d_state,))]
    for gradient, wanted in zip(gradients, expected, strict=True):
        error = (gradient - wanted).abs().max() / wanted.abs().max()
        assert error <= FLOAT64_TOLERANCE, f"relative error {error:.1e}"


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, leaves, [weights_like(output) for output in outputs]))


@torch.no_grad()
def _by_hand(
    chain: Chain, x_BSD: Tensor, h_prev_BSR: Tensor, options: Options
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Backpropagation through the chain by the formulas: gradients of x, of all matrices and of the state."""
    inputs, received = [], []
    for module in chain.modules:
        inputs.append(x_BSD)
        received.append(h_prev_BSR)
        y_BSD, h_prev_BSR = module.run(x_BSD, h_prev_BSR, options)
        x_BSD = y_BSD.tanh()
    d_y, d_state = weights_like(y_BSD), weights_like(h_prev_BSR)
    d_matrices: list[Tensor] = []
    for depth in reversed(range(len(chain.modules))):
        module = chain.modules[depth]
        d_x, own, d_received = _backward(module, inputs[depth], received[depth], d_y, d_state, options.carry)
        d_matrices = own + d_matrices
        d_state = torch.zeros_like(d_received) if options.detach_state else d_received
        d_y = d_x * (1 - inputs[depth].square())  # of the tanh between modules
    return d_x, d_matrices, d_state


def _backward(
    module: Module, x: Tensor, g: Tensor, dy: Tensor, d_state: Tensor, carry: str
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The formulas of README.md, in its letters; W_a [D,R] and W_b [R,O] are the paper's orientation."""
    w_a, w_b = module.lora_A_RD.T, module.lora_B_DR.T
    w_c, w_d, s = module.transition_RR, module.input_RR, SCALING
    keep = torch.ones_like(g) if module.mask_BSR is None else module.mask_BSR

    z = x @ w_a
    h = g + g @ w_c + z @ w_d
    low, i = h.min(-1, keepdim=True)
    high, k = h.max(-1, keepdim=True)
    q = 1 / (high - low + EPSILON)
    n = (h - low) * q
    u = z + keep * n

    du = s * dy @ w_b.T
    dn = keep * du + (d_state if carry == "normalized" else 0)
    s_0, s_1 = dn.sum(-1, keepdim=True), (dn * n).sum(-1, keepdim=True)
    columns = torch.arange(h.shape[-1])
    dh = q * (dn + (columns == i) * (s_1 - s_0) - (columns == k) * s_1)
    dh = dh + (d_state if carry == "raw" else 0)
    dz = du + dh @ w_d.T
    dx = dy @ module.frozen_DD.T + dz @ w_a.T
    dg = dh + dh @ w_c.T

    def summed(left: Tensor, right: Tensor) -> Tensor:
        return left.flatten(0, 1).T @ right.flatten(0, 1)

    dw_a, dw_b = summed(x, dz), s * summed(u, dy)
    return dx, [dw_a.T, dw_b.T, summed(g, dh), summed(z, dh)], dg
