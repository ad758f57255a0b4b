"""Clipping and counting alone, and steps whose gradients or loss are not finite, over one rank and two."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from ssmlora_dist.batches import Batch, upload
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.distributed.engine import (
    DataParallelEngine,
    clip_gradients,
    read_loss_and_norm,
    squared_norms,
    squares_at_once,
)
from ssmlora_dist.distributed.loss_scale import INITIAL

from .conftest import WORLD_SIZES, Results
from .jobs import STAGES

# One rounding of a float32 gradient on the way to its scaled value.
FLOAT32_ROUNDING = 2.0**-23
# Sums of some thousand squares in float64, in another order.
FLOAT64_ROUNDING = 1e-12


def with_gradient(values: list[float]) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return parameter


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, list[float]]:
    return {name: p.grad.tolist() for name, p in parameters.items() if p.grad is not None}


def test_gradients_are_scaled_to_the_norm() -> None:
    parameters = {"a": with_gradient([3.0, 0.0]), "b": with_gradient([4.0])}
    assert clip_gradients(parameters, max_norm=1.0) == 5.0
    clipped = gradients(parameters)
    # The divisor has 1e-6 added to it, which keeps the norm from passing the limit by a rounding.
    assert clipped["a"][0] == pytest.approx(0.6, rel=1e-6)
    assert clipped["b"][0] == pytest.approx(0.8, rel=1e-6)
    assert math.hypot(clipped["a"][0], clipped["b"][0]) <= 1.0


@pytest.mark.parametrize("max_norm", [5.0, 6.0, None])
def test_gradients_within_the_norm_stay_bitwise(max_norm: float | None) -> None:
    parameters = {"a": with_gradient([3.0]), "b": with_gradient([4.0])}
    assert clip_gradients(parameters, max_norm) == 5.0
    assert gradients(parameters) == {"a": [3.0], "b": [4.0]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_are_left_alone(bad: float) -> None:
    parameters = {"a": with_gradient([3.0]), "b": with_gradient([bad, 4.0])}
    assert not math.isfinite(clip_gradients(parameters, max_norm=1.0))
    assert gradients(parameters)["a"] == [3.0]
    assert gradients(parameters)["b"][1] == 4.0


def test_the_norm_does_not_depend_on_the_order_of_the_parameters() -> None:
    seed = 3
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-6, 6, 40).tolist()
    values = {f"p{i}": torch.randn(7, generator=generator) * scale for i, scale in enumerate(scales)}
    orders = [list(values), list(reversed(values)), sorted(values, key=lambda name: float(values[name][0]))]
    norms = {
        clip_gradients({name: with_gradient(values[name].tolist()) for name in order}, None)
        for order in orders
    }
    assert len(norms) == 1


def test_the_norm_is_summed_in_float64() -> None:
    # In float32, 1e4 squared and a thousand times 1 squared lie further apart than its digits reach.
    parameters = {"a": with_gradient([1e4]), **{f"b{i}": with_gradient([1.0]) for i in range(1000)}}
    assert clip_gradients(parameters, None) == math.sqrt(1e8 + 1000)
    # Squares that float32 does not hold.
    assert clip_gradients({"a": with_gradient([1e30])}, None) == pytest.approx(1e30, rel=FLOAT32_ROUNDING)
    assert clip_gradients({"a": with_gradient([1e-30])}, None) == pytest.approx(1e-30, rel=FLOAT32_ROUNDING)


def test_parameters_without_gradients_count_for_nothing() -> None:
    parameters = {"a": nn.Parameter(torch.zeros(2)), "b": with_gradient([4.0])}
    assert clip_gradients(parameters, max_norm=None) == 4.0
    assert clip_gradients({"a": nn.Parameter(torch.zeros(2))}, max_norm=1.0) == 0.0


@pytest.mark.parametrize("poison", ["gradients", "loss"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(
    results: Results, num_ranks: int, stage: int, poison: str
) -> None:
    """Only the last rank's last micro-batch is bad; parameters and the optimiser's moments stay."""
    for found in results.found(num_ranks, "skipping"):
        without, with_poison = found[f"zero {stage}, no poison"], found[f"zero {stage}, {poison}"]
        assert without["skipped"] == [False, False]
        assert with_poison["skipped"] == [False, True, False]
        assert [math.isfinite(norm) for norm in with_poison["grad_norm"]] == [True, False, True]
        first, kept, last = with_poison["weight"]
        assert kept == first
        assert [first, last] == without["weight"]
        assert first != last


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_step_that_is_rehearsed_changes_no_bit(results: Results, num_ranks: int, stage: int) -> None:
    for found in results.found(num_ranks, "skipping"):
        assert found[f"zero {stage}, rehearsed"] == found[f"zero {stage}, no poison"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_a_scaled_loss_changes_no_bit_and_an_overflow_halves_the_scale(
    results: Results, num_ranks: int, stage: int
) -> None:
    """Norms are of the gradients of the loss itself, and so is what they are clipped to."""
    for found in results.found(num_ranks, "skipping"):
        unscaled, scaled = found[f"zero {stage}, no poison"], found[f"zero {stage}, overflow"]
        assert scaled["skipped"] == scaled["halved"] == [False, True, False]
        assert scaled["loss_scale"] == [INITIAL, INITIAL, INITIAL / 2]
        assert unscaled["loss_scale"] == [None, None]
        first, kept, last = scaled["weight"]
        assert kept == first
        assert [first, last] == unscaled["weight"]
        assert [scaled["grad_norm"][0], scaled["grad_norm"][2]] == unscaled["grad_norm"]
        assert scaled["grad_norm"][0] > 1.0


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    parameters = {"a": with_gradient([3.0 * 1024, 0.0]), "b": with_gradient([4.0 * 1024])}
    expected = {"a": with_gradient([3.0, 0.0]), "b": with_gradient([4.0])}
    for max_norm in (1.0, 5.0, None):
        for name, values in {"a": [3.0, 0.0], "b": [4.0]}.items():
            parameters[name].grad = torch.tensor(values) * 1024
            expected[name].grad = torch.tensor(values)
        assert clip_gradients(parameters, max_norm, loss_scale=1024.0) == 5.0
        clip_gradients(expected, max_norm)
        assert gradients(parameters) == gradients(expected)


def test_loss_and_norm_are_read_together() -> None:
    parameters = {"a": with_gradient([3.0 * 64, 0.0]), "b": with_gradient([4.0 * 64]), "c": nn.Parameter()}
    loss = torch.tensor(2.5, dtype=torch.float64)
    assert read_loss_and_norm(loss, parameters, loss_scale=64.0) == (2.5, 5.0)
    assert read_loss_and_norm(loss, {}) == (2.5, 0.0)
    assert gradients(parameters) == {"a": [192.0, 0.0], "b": [256.0]}


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        ),
    ],
)
def test_norms_at_once_are_those_one_by_one(device: str) -> None:
    torch.manual_seed(3)
    print("seed 3")
    # Beyond what float32 can square, and below.
    grads = [torch.randn(size) * scale for size, scale in (((64, 16), 1.0), ((5,), 1e30), ((70,), 1e-30))]
    parameters = {str(index): nn.Parameter(torch.zeros_like(grad)) for index, grad in enumerate(grads)}
    for parameter, grad in zip(parameters.values(), grads, strict=True):
        parameter.grad = grad
    expected = [float(square) for square in squared_norms(parameters, 64.0).values()]
    found = squares_at_once([grad.to(device) for grad in grads], 64.0)
    assert found.device.type == device
    assert found.tolist() == pytest.approx(expected, rel=FLOAT64_ROUNDING)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_uploaded_arrives() -> None:
    given = torch.arange(1 << 16)
    assert torch.equal(upload(given, torch.device("cuda")).cpu(), given)


class Device(torch.Tensor):
    """Stands for a tensor on a GPU: it writes down what makes the host wait for the device."""

    waits: ClassVar[list[str]] = []
    _WAITING = ("to", "cpu", "item", "tolist", "__float__", "__int__", "__bool__", "nonzero", "numpy")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in cls._WAITING:
            cls.waits.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_nothing_waits_for_the_device_between_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host runs ahead of it: batches are copied before the first, the loss is read after the last."""
    weight = torch.nn.Parameter(torch.ones(1))

    class DeepSpeed(SimpleNamespace):
        def __call__(self, batch: Batch) -> torch.Tensor:
            return (batch.targets.float().sum() * weight).sum().as_subclass(Device)

    deepspeed = DeepSpeed(
        optimizer=SimpleNamespace(param_groups=[{}]),
        module=torch.nn.Linear(1, 1),
        set_gradient_accumulation_boundary=lambda last: None,
        backward=lambda loss, scale_wrt_gas: loss.backward(),
        step=lambda: None,
        zero_grad=lambda: None,
    )
    monkeypatch.setattr("deepspeed.initialize", lambda **_: (deepspeed, None, None, None))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values, **_: None)
    context = DistributedContext(0, 1, 0, torch.device("cpu"))
    config = {"zero_optimization": {"stage": 0}}
    optimizer = torch.optim.SGD([weight], lr=1.0)
    engine = DataParallelEngine(deepspeed.module, {"weight": weight}, optimizer, config, context, 1.0)
    waits_at_check: list[int] = []
    ids = torch.tensor([[7, 7]])
    given = [Batch.of(ids + value, input_ids=ids) for value in (1, 2, 3)]
    batches = [replace(batch, targets=batch.targets.as_subclass(Device)) for batch in given]
    Device.waits.clear()
    result = engine.train_step(batches, 0.1, lambda: waits_at_check.append(len(Device.waits)))
    assert Device.waits.count("to") == len(batches)
    # The last entry is of after the step, where the loss is read.
    assert waits_at_check == [waits_at_check[0]] * len(batches), Device.waits
    assert result.num_target_tokens == 3
