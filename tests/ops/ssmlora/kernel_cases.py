"""The Triton kernels against the plain operators: run by `test_triton_kernels.py`.

With `TRITON_INTERPRET=1` on the CPU, else on a GPU. Triton reads it when kernels are made, so this is a
process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist.ops import dropout, triton_dropout
from ssmlora_dist.ops.ssmlora import state_step, triton_kernels
from ssmlora_dist.ops.ssmlora.reference import MIN_SPREAD
from tests.tiny import dropout_seeds

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BATCH, SCALING, DROPOUT_ID, PROBABILITY = 2, 1.5, 5, 0.3
SEEDS = dropout_seeds([2**40 + 7, -5], 600).to(DEVICE)
# Relative to the largest number of a tensor. Float32: sums in another order. Otherwise results are rounded to
# 8 or 11 bits, and numbers that differ in their last bit may be rounded apart; Triton's interpreter rounds to
# bfloat16 towards zero, as no GPU does.
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FORMS = [
    ("minmax", "normalized", 0.0),
    ("minmax", "raw", PROBABILITY),
    ("rms", "normalized", PROBABILITY),
    ("rms", "raw", 0.0),
    ("none", "normalized", PROBABILITY),
    ("none", "raw", 0.0),
]


def draw(tokens: int, rank: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    print(f"seed {tokens * 1000 + rank}")
    generator = torch.Generator().manual_seed(tokens * 1000 + rank)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(DEVICE)

    # As in a layer: z is one of three in a product, the state one of two axes.
    return {
        "z": normal(BATCH, tokens, 3 * rank).to(dtype)[..., rank : 2 * rank],
        "h_prev": normal(BATCH, tokens, 2, rank).to(dtype)[:, :, 1],
        "transition": normal(rank, rank, scale=0.5 * rank**-0.5),
        "input": normal(rank, rank, scale=0.7 * rank**-0.5),
        "d_u": normal(BATCH, tokens, rank).to(dtype),
        "d_carried": normal(BATCH, tokens, 2, rank).to(dtype)[:, :, 0],
    }


def run(
    module: Any, tensors: dict[str, Tensor], form: tuple[str, str, float], full: bool = True
) -> tuple[Tensor, ...]:
    """All results of both operators; not `full`: no gradient of the carried state, and none of h_prev."""
    normalization, carry, probability = form
    inputs = [tensors[name] for name in ("z", "h_prev", "transition", "input")]
    rng_args = (probability, DROPOUT_ID)
    settings = (
        SEEDS[:, : inputs[0].shape[1]] if probability else None,
        SCALING,
        normalization,
        carry,
        *rng_args,
    )
    d_carried = tensors["d_carried"] if full else None
    forward = module.state_forward(*inputs, *settings)
    return *forward, *module.state_backward(tensors["d_u"], d_carried, full, *inputs, *settings)


NAMES = ("u", "carried", "u again", "d_z", "d_h_prev", "d_transition", "d_input")


def assert_same(tensors: dict[str, Tensor], *options: Any) -> None:
    got, wanted = run(triton_kernels, tensors, *options), run(state_step, tensors, *options)
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert a.dtype == b.dtype, name
        assert a.shape == b.shape, name
        if b.numel():
            tolerance = TOLERANCES[torch.float32 if name in NAMES[-2:] else b.dtype]
            error = ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item()
            assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("tokens", [1, 3, 17, 129])
def test_every_size(tokens: int, rank: int) -> None:
    assert_same(draw(tokens, rank), FORMS[0])


@pytest.mark.parametrize("tokens", [1, 17])
def test_the_largest_rank(tokens: int) -> None:
    assert_same(draw(tokens, triton_kernels.MAX_RANK), FORMS[0])


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_form(form: tuple[str, str, float], dtype: torch.dtype) -> None:
    assert_same(draw(17, 8, dtype), form)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_a_detached_module_at_the_end_of_its_axis(form: tuple[str, str, float]) -> None:
    assert_same(draw(17, 8), form, False)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_dead_and_tied_rows(form: tuple[str, str, float]) -> None:
    tensors = draw(5, 4)
    rows = [
        [3.0, 3.0, 3.0, 3.0],
        [0.0, 0.9 * MIN_SPREAD, 0.0, 0.0],
        [0.0, 2.0 * MIN_SPREAD, 0.0, 0.0],
        [4.0, 1.0, 1.0, 4.0],
        [2.0, 2.0, 5.0, 2.0],
    ]
    tensors["h_prev"] = torch.tensor([rows] * BATCH, device=DEVICE)
    tensors["z"] = torch.zeros(BATCH, 5, 4, device=DEVICE)
    tensors["transition"] = torch.zeros(4, 4, device=DEVICE)
    assert_same(tensors, form)


def test_a_program_takes_several_blocks_and_the_sum_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "MAX_PROGRAMS", 2)
    assert_same(draw(129, 8), FORMS[0])


def test_the_same_bits_in_every_run() -> None:
    first, second = (run(triton_kernels, draw(129, 8), FORMS[1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dropout_drops_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 1500, generator=torch.Generator().manual_seed(0))
    x = x.to(DEVICE, dtype)[..., :1300]
    got = triton_dropout.dropout(x, SEEDS[:, :7], DROPOUT_ID, PROBABILITY)
    expected = dropout.dropout(x, SEEDS[:, :7], DROPOUT_ID, PROBABILITY)
    assert torch.equal(got == 0, expected == 0)
    torch.testing.assert_close(got, expected, rtol=TOLERANCES[dtype], atol=0)


def test_other_dtypes_and_ranks_are_left_to_the_plain_operators() -> None:
    for kernels, shape, dtype, taken in (
        (triton_kernels, (1, 1, 128), torch.bfloat16, True),
        (triton_kernels, (1, 1, 129), torch.bfloat16, False),
        (triton_kernels, (1, 1, 8), torch.float64, False),
        (triton_dropout, (1, 1, 4096), torch.float16, True),
        (triton_dropout, (1, 1, 8), torch.float64, False),
    ):
        assert kernels.takes(torch.empty(shape, dtype=dtype)) == taken
