"""Values of the reference recurrence: an example by hand, rows without information, ties, dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist.ops.form import state_dtype
from ssmlora_dist.ops.ssmlora.reference import (
    EPSILON,
    MIN_SPREAD,
    normalize,
    normalize_minmax,
    normalize_rms,
    state_step,
    time_module,
)
from tests.ops.ssmlora.recurrence import Options, random_chain

SEED = 11
# Float64 rounding of a handful of operations on numbers of order 10.
FLOAT64_TOLERANCE = 1e-14
# bfloat16 keeps 8 bits; y sums a handful of rounded products.
BFLOAT16_TOLERANCE = 2e-2


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = SEED) -> Tensor:
    print(f"seed {seed}")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HAND_A = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]  # z = (1, 2, 3) for x = (1, 2)
HAND_B = [[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]
HAND_C = [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, -1.0]]  # g W_c = (0, 1, -2) for g = (1, 0, 2)
HAND_D = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]  # z W_d = (1, 4, 9)


def by_hand(**options: Any) -> tuple[Tensor, Tensor]:
    x, base, received = float64([[[1.0, 2.0]]]), float64([[[10.0, 20.0]]]), float64([[[1.0, 0.0, 2.0]]])
    matrices = [float64(matrix) for matrix in (HAND_A, HAND_B, HAND_C, HAND_D)]
    return time_module(x, base, received, *matrices, scaling=0.5, **options)


def test_an_example_worked_by_hand() -> None:
    # h = (1, 0, 2) + (0, 1, -2) + (1, 4, 9) = (2, 5, 9);  n = (0, 3, 7) / (7 + eps), nearly (0, 3/7, 1)
    n = [0.0, 3 / (7 + EPSILON), 7 / (7 + EPSILON)]
    # u = z + n;  delta = 0.5 (u_0 + 2 u_2, u_1 - u_2)
    u = [1 + n[0], 2 + n[1], 3 + n[2]]
    expected = float64([[[10 + 0.5 * (u[0] + 2 * u[2]), 20 + 0.5 * (u[1] - u[2])]]])
    y, state = by_hand()
    torch.testing.assert_close(y, expected, rtol=0, atol=FLOAT64_TOLERANCE)
    torch.testing.assert_close(state, float64([[n]]), rtol=0, atol=FLOAT64_TOLERANCE)
    # What a reader works out without eps: u = (1, 17/7, 4), delta = (4.5, -11/14).
    torch.testing.assert_close(y, float64([[[14.5, 20 - 11 / 14]]]), rtol=0, atol=10 * EPSILON)


def test_the_raw_carry_hands_on_the_state_itself() -> None:
    y, state = by_hand(carry="raw")
    assert torch.equal(state, float64([[[2.0, 5.0, 9.0]]]))
    assert torch.equal(y, by_hand()[0])


def test_the_dropout_mask_acts_on_the_normalised_state_alone() -> None:
    # K = (2, 0, 2): u = (1, 2, 5), delta = 0.5 (1 + 10, 2 - 5); what is carried is not dropped.
    y, state = by_hand(dropout_mask_BSR=float64([[[2.0, 0.0, 2.0]]]))
    torch.testing.assert_close(y, float64([[[15.5, 18.5]]]), rtol=0, atol=10 * EPSILON)
    assert torch.equal(state, by_hand()[1])


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("rms", [2 / 110**0.5 * 3**0.5, 5 / 110**0.5 * 3**0.5, 9 / 110**0.5 * 3**0.5]),
        ("none", [2.0, 5.0, 9.0]),
    ],
)
def test_other_normalisations_by_hand(normalization: str, expected: list[float]) -> None:
    _, state = by_hand(normalization=normalization)
    torch.testing.assert_close(state, float64([[expected]]), rtol=0, atol=FLOAT64_TOLERANCE)


def test_minmax_lies_between_0_and_1_and_keeps_the_order() -> None:
    h = random(7, 5, 6)
    n = normalize_minmax(h)
    assert torch.equal(n.min(-1).values, torch.zeros(7, 5, dtype=torch.float64))
    assert n.max() < 1
    torch.testing.assert_close(n.max(-1).values, torch.ones(7, 5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.equal(n.argsort(-1), h.argsort(-1))
    # A shift and a scale change nothing but the weight of eps beside the spread.
    torch.testing.assert_close(normalize_minmax(3 * h - 2), n, rtol=0, atol=1e-6)


def test_rms_rows_have_mean_square_1() -> None:
    n = normalize_rms(random(7, 5, 6))
    mean_squares = n.square().mean(-1)
    torch.testing.assert_close(mean_squares, torch.ones_like(mean_squares), rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalization", ["minmax", "rms"])
def test_a_row_under_the_threshold_is_0_without_gradient(normalization: str, dtype: torch.dtype) -> None:
    shape = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)
    under, over = 0.99 * MIN_SPREAD * shape, 2.0 * MIN_SPREAD * shape
    rows = torch.stack([under, over, torch.zeros(3, dtype=dtype)]).requires_grad_()
    n = normalize(rows, normalization)
    n.backward(torch.tensor([[1.0, -2.0, 3.0]], dtype=dtype).expand(3, 3))
    assert rows.grad is not None
    for dead in (0, 2):
        assert torch.equal(n[dead], torch.zeros(3, dtype=dtype))
        assert torch.equal(rows.grad[dead], torch.zeros(3, dtype=dtype))
    assert n[1].detach().max() > 0.99
    # Just above the threshold a gradient is at most of order 1 / MIN_SPREAD.
    assert 0 < rows.grad[1].abs().max() < 10 / MIN_SPREAD


def test_epsilon_is_added_to_the_spread() -> None:
    spread = 2 * MIN_SPREAD
    n = normalize_minmax(float64([0.0, spread]))
    assert n[1] == spread / (spread + EPSILON)
    assert n[1] < 1


@pytest.mark.parametrize("normalization", ["minmax", "rms"])
@pytest.mark.parametrize("carry", ["normalized", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_state_input_the_state_is_silent_and_gradients_finite(
    normalization: str, carry: str, dtype: torch.dtype
) -> None:
    """W_d = 0 and no state received: h = 0 in every row, where 1 / (spread + eps) is 1e8."""
    x, _, chain = random_chain(1, dropout=False)
    A, B, C, _ = (matrix.detach().to(dtype).requires_grad_() for matrix in chain.matrices)
    x = x.detach().to(dtype).requires_grad_()
    received = torch.zeros(*x.shape[:2], A.shape[0], dtype=dtype, requires_grad=True)
    D = torch.zeros_like(C, requires_grad=True)
    base = torch.zeros_like(x)
    y, state = time_module(
        x, base, received, A, B, C, D, scaling=1.0, normalization=normalization, carry=carry
    )
    assert torch.equal(state, torch.zeros_like(state))
    assert torch.equal(y, torch.nn.functional.linear(torch.nn.functional.linear(x, A), B))
    gradients = torch.autograd.grad(y.sum(), (x, received, A, B, C, D))
    assert all(gradient.isfinite().all() for gradient in gradients)
    by_name = dict(zip("x received A B C D".split(), gradients, strict=True))
    for silent in ("received", "C", "D"):
        assert torch.equal(by_name[silent], torch.zeros_like(by_name[silent]))
    for spoken in ("x", "A", "B"):
        assert by_name[spoken].abs().max() > 0


def test_a_constant_row_among_others_takes_no_gradient() -> None:
    h = torch.tensor([[3.0, 3.0, 3.0], [1.0, 2.0, 4.0]], requires_grad=True)
    n = normalize_minmax(h)
    (gradient,) = torch.autograd.grad(n, h, torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]))
    assert torch.equal(n[0], torch.zeros(3))
    assert torch.equal(gradient[0], torch.zeros(3))
    assert gradient[1].abs().max() > 0


def test_ties_go_to_the_first_least_and_the_first_largest() -> None:
    h = float64([[4.0, 1.0, 1.0, 4.0, 2.0]]).requires_grad_()
    d_n = float64([[0.3, -1.1, 0.7, 2.0, 0.5]])
    n = normalize_minmax(h)
    (gradient,) = torch.autograd.grad(n, h, d_n)
    q = 1 / (3 + EPSILON)
    values = float64([[3 * q, 0.0, 0.0, 3 * q, q]])
    s_0, s_1 = d_n.sum(), (d_n * values).sum()
    expected = q * (d_n + float64([[0, 1, 0, 0, 0]]) * (s_1 - s_0) - float64([[1, 0, 0, 0, 0]]) * s_1)
    torch.testing.assert_close(n.detach(), values, rtol=0, atol=FLOAT64_TOLERANCE)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=FLOAT64_TOLERANCE)


def test_the_gradient_of_a_row_sums_to_zero() -> None:
    """Minmax does not see a shift of its row, so its gradient has no part along one."""
    h = random(4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(normalize_minmax(h), h, random(4, 6, seed=SEED + 1))
    sums = gradient.sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_state_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert state_dtype(dtype) == expected
    x, received, chain = random_chain(1, dropout=False)
    matrices = chain.matrices if dtype == torch.float64 else tuple(m.float() for m in chain.matrices)
    y, state = time_module(x.to(dtype), x.to(dtype), received.to(dtype), *matrices, scaling=1.0)
    assert y.dtype == dtype
    assert state.dtype == expected


def test_bfloat16_inputs_agree_with_float64() -> None:
    x, received, chain = random_chain(1, dropout=False)
    expected_y, expected_state = chain.run(x, received, Options())
    matrices = tuple(matrix.float() for matrix in chain.matrices)
    base = (x @ chain.modules[0].frozen_DD).bfloat16()
    y, state = time_module(x.bfloat16(), base, received.bfloat16(), *matrices, scaling=1.5)
    torch.testing.assert_close(y.double(), expected_y, rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE)
    torch.testing.assert_close(state.double(), expected_state[-1], rtol=0, atol=BFLOAT16_TOLERANCE)


def test_a_base_output_of_another_dtype_keeps_its_dtype() -> None:
    x, received, chain = random_chain(1, dropout=False)
    y, _ = time_module(x.float(), x.bfloat16(), received, *chain.matrices, scaling=1.0)
    assert y.dtype == torch.bfloat16


def test_a_token_sees_its_own_column_only() -> None:
    x, received, chain = random_chain(1, dropout=False)
    y, state = chain.run(x, received, Options())
    for token in range(x.shape[1]):
        column = slice(token, token + 1)
        alone_y, alone_state = chain.run(x[:, column], received[:, column], Options())
        torch.testing.assert_close(alone_y, y[:, column], rtol=0, atol=FLOAT64_TOLERANCE)
        torch.testing.assert_close(alone_state[-1], state[-1][:, column], rtol=0, atol=FLOAT64_TOLERANCE)


def test_state_step_is_an_euler_step() -> None:
    received, z = random(2, 3, 4), random(2, 3, 4, seed=SEED + 1)
    transition, entry = random(4, 4, seed=SEED + 2), random(4, 4, seed=SEED + 3)
    expected = received @ (torch.eye(4, dtype=torch.float64) + transition) + z @ entry
    stepped = state_step(received, z, transition, entry)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=FLOAT64_TOLERANCE)


def test_unknown_names_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="'softmax'; allowed: minmax, rms, none"):
        normalize(torch.zeros(1, 2), "softmax")
    with pytest.raises(ValueError, match="'softmax'; allowed: minmax, rms, none"):
        by_hand(normalization="softmax")
    with pytest.raises(ValueError, match="'cooked'; allowed: normalized, raw"):
        by_hand(carry="cooked")
