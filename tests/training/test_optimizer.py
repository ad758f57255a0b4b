"""The optimiser that a name in the configuration stands for."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import bitsandbytes
import pytest
import torch
from torch import nn

from ssmlora_dist.distributed.engine import set_learning_rate
from ssmlora_dist.distributed.optimizer_state import OptimizerState, restore_optimizer_state
from ssmlora_dist.quantization.optimizers import PAGED_FROM
from ssmlora_dist.training.optimizer import build_optimizer, unpaged_text

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


NAMES = (
    "layers.1.up.lora_A.weight",
    "layers.0.q.lora_B.weight",
    "layers.0.q.state_input",
    "layers.0.q.lora_A.weight",
)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.0, 1.0), [(1.0, [3, 1, 2, 0])]),
        ((16.0, 1.0), [(1.0, [3, 2, 0]), (16.0, [1])]),
        ((16.0, 0.5), [(0.5, [2]), (1.0, [3, 0]), (16.0, [1])]),
        ((4.0, 4.0), [(1.0, [3, 0]), (4.0, [1, 2])]),
    ],
)
def test_a_group_for_each_learning_rate(kind: str, ratios: Any, expected: Any) -> None:
    given = {name: nn.Parameter(torch.ones(2)) for name in NAMES}
    optimizer = build_optimizer(kind, given, **SETTINGS, lora_b_ratio=ratios[0], state_ratio=ratios[1])  # type: ignore[arg-type]
    names = {id(parameter): name for name, parameter in given.items()}
    found = [(own["lr"], [names[id(p)] for p in own["params"]]) for own in optimizer.param_groups]
    assert found == [(0.1 * ratio, [NAMES[index] for index in indices]) for ratio, indices in expected]
    set_learning_rate(optimizer, 0.03)
    assert [own["lr"] for own in optimizer.param_groups] == [0.03 * ratio for ratio, _ in expected]


def test_ratios_of_one_change_no_bit() -> None:
    seed = 5
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    ours, plain = ({name: nn.Parameter(torch.ones(3)) for name in NAMES} for _ in range(2))
    optimizers = (
        build_optimizer("adamw", ours, **SETTINGS),  # type: ignore[arg-type]
        torch.optim.AdamW(
            [plain[name] for name in sorted(plain)], lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.01
        ),
    )
    for rate in (0.1, 0.07, 1e-3):
        for name in NAMES:
            plain[name].grad = torch.randn(3, generator=generator)
            ours[name].grad = plain[name].grad.clone()
        for optimizer in optimizers:
            set_learning_rate(optimizer, rate)
            optimizer.step()
    assert all(torch.equal(ours[name], plain[name]) for name in NAMES)


def test_a_ratio_is_another_learning_rate() -> None:
    given = {name: nn.Parameter(torch.ones(1)) for name in NAMES}
    for parameter in given.values():
        parameter.grad = torch.full((1,), 0.5)
    build_optimizer("adamw", given, **SETTINGS, lora_b_ratio=4.0, state_ratio=0.5).step()  # type: ignore[arg-type]
    moved = [1.0 - parameter.item() for parameter in given.values()]
    # The rate itself, and decay by a hundredth of it.
    assert moved == pytest.approx([0.101, 0.404, 0.0505, 0.101], rel=1e-5)


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


@pytest.mark.parametrize(
    ("kind", "size", "says"),
    [
        ("paged_adamw", 32_768, "the largest of what is trained has 32,768: nothing is paged"),
        ("paged_adamw_8bit", 99_999, "nothing is paged"),
        ("paged_adamw", 100_000, None),
        ("adamw_8bit", 32_768, None),
        ("adamw", 32_768, None),
    ],
)
def test_a_paged_optimizer_says_that_it_has_nothing_to_page(kind: str, size: int, says: str | None) -> None:
    """By bitsandbytes' own threshold, which is above an adapter's matrices."""
    given = {"a": nn.Parameter(torch.zeros(size)), "b": nn.Parameter(torch.zeros(2))}
    found = unpaged_text(build_optimizer(kind, given, **SETTINGS))  # type: ignore[arg-type]
    assert found is None if says is None else says in (found or "")


def test_the_threshold_is_bitsandbytes_own() -> None:
    """Its buffers below it are ordinary tensors."""
    source = inspect.getsource(bitsandbytes.optim.PagedAdamW.get_state_buffer)
    assert "numel() < 1e5" in source
    assert PAGED_FROM == 1e5


class Paging(torch.optim.SGD):
    """Makes its moments as bitsandbytes' paged optimisers do: not as ordinary tensors."""

    made: ClassVar[list[torch.Tensor]] = []

    def get_state_buffer(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        self.made.append(torch.zeros_like(parameter, dtype=dtype))
        return self.made[-1]


def test_moments_are_paged_again_when_a_run_goes_on() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    optimizer = Paging([weight])
    moments = {"state1": torch.arange(6, dtype=torch.uint8).view(2, 3), "absmax1": torch.ones(1)}
    saved = OptimizerState(4, {kind: {"w": value} for kind, value in moments.items()})
    restore_optimizer_state(optimizer, {"w": weight}, 0, saved)
    state = optimizer.state[weight]
    assert state["state1"] is optimizer.made[0]
    assert torch.equal(state["state1"], moments["state1"])
    assert torch.equal(state["absmax1"], moments["absmax1"])
    assert len(optimizer.made) == 1
    assert state["step"] == 4
