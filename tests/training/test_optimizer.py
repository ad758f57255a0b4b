"""The optimiser that a name in the configuration stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ssmlora_dist.training.optimizer import build_optimizer

SETTINGS = {"learning_rate": 0.1, "betas": (0.8, 0.95), "epsilon": 1e-6, "weight_decay": 0.01}


def parameters() -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.full((2,), value)) for name, value in (("b", 2.0), ("a", 1.0), ("c", 3.0))
    }


def test_adamw_with_its_settings_over_the_parameters_by_name() -> None:
    given = parameters()
    optimizer = build_optimizer("adamw", given, **SETTINGS)  # type: ignore[arg-type]
    assert isinstance(optimizer, torch.optim.AdamW)
    [group] = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(given[name]) for name in ("a", "b", "c")]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        0.1,
        (0.8, 0.95),
        1e-6,
        0.01,
    )


def test_a_step_of_adamw_by_hand() -> None:
    """The first step moves every value by the learning rate, after decay by a multiple of it."""
    given = {"a": nn.Parameter(torch.tensor([1.0, 1.0]))}
    given["a"].grad = torch.tensor([0.5, -0.5])
    build_optimizer("adamw", given, **SETTINGS).step()  # type: ignore[arg-type]
    decayed = 1.0 - 0.1 * 0.01
    assert given["a"].tolist() == pytest.approx([decayed - 0.1, decayed + 0.1], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_low_memory_variants_step_on_a_gpu(kind: str) -> None:
    # From 4,096 values on the moments are kept in 8 bits.
    given = {"a": nn.Parameter(torch.ones(8192, device="cuda"))}
    given["a"].grad = torch.full_like(given["a"], 0.5)
    optimizer = build_optimizer(kind, given, **SETTINGS)  # type: ignore[arg-type]
    optimizer.step()
    decayed = 1.0 - 0.1 * 0.01
    # 8-bit moments have 1% steps.
    assert given["a"].tolist() == pytest.approx([decayed - 0.1] * 8192, rel=1e-2)
