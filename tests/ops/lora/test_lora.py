"""Plain LoRA through the fused functions, against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlora_dist.ops import fused
from ssmlora_dist.ops.dropout import keep_mask
from ssmlora_dist.ops.lora import LoRA
from tests.ops.ssmlora.one_module import (
    DROPOUT,
    DROPOUT_ID,
    DROPOUT_SEEDS,
    SCALING,
    TOLERANCES,
    draw,
    kept_by,
)
from tests.ops.ssmlora.recurrence import weights_like
from tests.tiny import dropout_seeds

FORM = LoRA(rank=4)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@dtypes
@pytest.mark.parametrize("num_readers", [1, 3])
def test_lora_is_its_formula(dtype: torch.dtype, num_readers: int) -> None:
    inputs = draw(tokens=17, rank=6, dtype=dtype)
    matrices = [
        (scale * inputs.lora_A_RD.detach(), scale * inputs.lora_B_OR.detach())
        for scale in range(1, num_readers + 1)
    ]
    leaves = [m.requires_grad_() for pair in matrices for m in pair]

    def ours(x_BSD: Tensor) -> list[Tensor]:
        x_BSD, z = fused.down_project(x_BSD, [a for a, _ in matrices])
        bases = [F.linear(x_BSD, inputs.frozen_OD) for _ in matrices]
        return [
            fused.add_delta(base, z_BSR, None, b, FORM, {}, SCALING)[0]
            for base, z_BSR, (_, b) in zip(bases, z, matrices, strict=True)
        ]

    def formula(x_BSD: Tensor) -> list[Tensor]:
        base = F.linear(x_BSD, inputs.frozen_OD)
        return [base + SCALING * F.linear(F.linear(x_BSD, a.to(dtype)), b.to(dtype)) for a, b in matrices]

    results = []
    for run in (ours, formula):
        x_BSD = inputs.x_BSD.detach().clone().requires_grad_()
        outputs = run(x_BSD)
        gradients = torch.autograd.grad(outputs, [x_BSD, *leaves], [weights_like(y) for y in outputs])
        results.append([*outputs, *gradients])
    for got, wanted in zip(*results, strict=True):
        error = ((got - wanted).abs().max() / wanted.abs().max()).item()
        assert error <= TOLERANCES[dtype], f"relative error {error:.1e}"


def test_lora_drops_the_input_of_its_own_half_alone() -> None:
    inputs = draw()
    seeds = dropout_seeds(DROPOUT_SEEDS, inputs.x_BSD.shape[1])
    kept = keep_mask(seeds, DROPOUT_ID, inputs.x_BSD.shape[-1], DROPOUT).double() / (1 - DROPOUT)

    def ours(x_BSD: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x_BSD, (z_BSR,) = fused.down_project(x_BSD, [a], seeds, DROPOUT_ID, DROPOUT)
        return fused.add_delta(F.linear(x_BSD, inputs.frozen_OD), z_BSR, None, b, FORM, {}, SCALING)[0]

    def formula(x_BSD: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x_BSD, inputs.frozen_OD) + SCALING * F.linear(F.linear(x_BSD * kept, a), b)

    leaves = (inputs.x_BSD, inputs.lora_A_RD, inputs.lora_B_OR)
    assert torch.autograd.gradcheck(ours, leaves)
    torch.testing.assert_close(ours(*leaves), formula(*leaves), rtol=0, atol=TOLERANCES[torch.float64])
    assert len(kept_by(lambda: ours(*leaves), *leaves[1:], inputs.frozen_OD, seeds)) == 2, "x and z"
    _, (z_BSR,) = fused.down_project(inputs.x_BSD, [inputs.lora_A_RD], seeds, DROPOUT_ID, DROPOUT)
    _, (rest_BSR,) = fused.down_project(
        inputs.x_BSD[:, 2:], [inputs.lora_A_RD], seeds[:, 2:], DROPOUT_ID, DROPOUT
    )
    torch.testing.assert_close(rest_BSR, z_BSR[:, 2:], rtol=0, atol=TOLERANCES[torch.float64])
