"""I10: the fused time module against the reference, outputs and gradients; what it keeps and allocates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlora_dist.ops import fused
from ssmlora_dist.ops.ssmlora import reference
from ssmlora_dist.ops.ssmlora.state_step import Recurrence
from tests.ops.ssmlora.one_module import (
    BATCH,
    DROPOUT,
    DROPOUT_ID,
    DROPOUT_SEEDS,
    FEATURES,
    OUT_FEATURES,
    SCALING,
    TOLERANCES,
    Inputs,
    assert_is_the_reference,
    assert_same,
    draw,
    kept_by,
    outputs_and_gradients,
    run_fused,
    run_reference,
    settings_of,
)
from tests.ops.ssmlora.recurrence import weights_like
from tests.tiny import dropout_seeds

normalizations = pytest.mark.parametrize("normalization", ["minmax", "rms", "none"])
carries = pytest.mark.parametrize("carry", ["normalized", "raw"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@normalizations
@carries
@dtypes
@pytest.mark.parametrize("detach", [False, True], ids=["full", "detached"])
@pytest.mark.parametrize("drop", [False, True], ids=["no_dropout", "dropout"])
def test_i10_every_form(normalization: str, carry: str, dtype: torch.dtype, detach: bool, drop: bool) -> None:
    seeds = dropout_seeds(DROPOUT_SEEDS, 5) if drop else None
    recurrence = Recurrence(SCALING, normalization, carry, DROPOUT, DROPOUT_ID)
    assert_is_the_reference(draw(dtype=dtype), recurrence, detach, seeds)


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 256])
@pytest.mark.parametrize("tokens", [1, 3, 17, 129])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_i10_every_size(tokens: int, rank: int, dtype: torch.dtype) -> None:
    assert_is_the_reference(draw(tokens, rank, dtype, batch=1), Recurrence(SCALING))


def rows_of_interest(dtype: torch.dtype) -> Inputs:
    """h is what was received: constant rows, rows under and just over the threshold, ties at both ends."""
    spread = reference.MIN_SPREAD
    rows = [
        [3.0, 3.0, 3.0, 3.0],
        [0.0, 0.0, 0.0, 0.0],
        [0.0, 0.9 * spread, 0.0, 0.5 * spread],
        [0.0, 2.0 * spread, 0.0, 0.5 * spread],
        [4.0, 1.0, 1.0, 4.0],
        [2.0, 2.0, 5.0, 2.0],
        [7.0, 7.0, -1.0, 7.0],
    ]
    inputs = draw(len(rows), 4, dtype, batch=1)
    return replace(
        inputs,
        x_BSD=torch.zeros_like(inputs.x_BSD),
        h_prev_BSR=torch.tensor([rows], dtype=dtype),
        transition_RR=torch.zeros_like(inputs.transition_RR),
    ).copy()


@normalizations
@carries
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_i10_dead_and_tied_rows(normalization: str, carry: str, dtype: torch.dtype) -> None:
    inputs = rows_of_interest(dtype)
    assert_is_the_reference(inputs, Recurrence(SCALING, normalization, carry))


@carries
def test_i10_a_state_kept_in_another_dtype(carry: str) -> None:
    inputs = draw(dtype=torch.bfloat16)
    wide = replace(inputs, h_prev_BSR=inputs.h_prev_BSR.float()).copy()
    assert_is_the_reference(wide, Recurrence(SCALING, carry=carry))
    assert run_fused(wide, Recurrence(SCALING))[1].dtype == torch.float32


def test_i10_one_axis_of_several() -> None:
    """The state is read in place: tokens lie apart."""
    inputs = draw()
    packed = torch.randn(BATCH, 5, 3, 4, dtype=torch.float64)
    packed[:, :, 1] = inputs.h_prev_BSR.detach()
    strided = replace(inputs, h_prev_BSR=packed[:, :, 1].requires_grad_())
    expected = run_fused(inputs, Recurrence(SCALING))
    assert all(
        torch.equal(a, b) for a, b in zip(run_fused(strided, Recurrence(SCALING)), expected, strict=True)
    )


@normalizations
@carries
@pytest.mark.parametrize("drop", [False, True], ids=["no_dropout", "dropout"])
def test_gradcheck(normalization: str, carry: str, drop: bool) -> None:
    inputs = draw(tokens=2)
    seeds = dropout_seeds(DROPOUT_SEEDS, 2) if drop else None

    def outputs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        moved = Inputs(*leaves, frozen_OD=inputs.frozen_OD)
        return run_fused(moved, Recurrence(SCALING, normalization, carry, DROPOUT, DROPOUT_ID), False, seeds)

    assert torch.autograd.gradcheck(outputs, inputs.leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_every_run(dtype: torch.dtype) -> None:
    inputs = draw(129, 16, dtype)
    options = (Recurrence(SCALING, dropout=DROPOUT), False, dropout_seeds(DROPOUT_SEEDS, 129))
    first, second = (outputs_and_gradients(run_fused, inputs, *options) for _ in range(2))
    assert all(
        a is not None and b is not None and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


def test_tokens_split_among_processes_drop_what_whole_rows_do() -> None:
    whole = draw(tokens=7)
    recurrence = Recurrence(SCALING, dropout=DROPOUT, dropout_id=DROPOUT_ID)
    seeds = dropout_seeds(DROPOUT_SEEDS, 7)
    y_BSO, carried_BSR, d_x_BSD, d_h_prev_BSR, *d_weights = outputs_and_gradients(
        run_fused, whole, recurrence, False, seeds
    )
    parts = []
    for first, stop in ((0, 3), (3, 7)):
        part = replace(
            whole, x_BSD=whole.x_BSD[:, first:stop], h_prev_BSR=whole.h_prev_BSR[:, first:stop]
        ).copy()
        outputs = run_fused(part, recurrence, False, seeds[:, first:stop])
        weights = [weights_like(y_BSO)[:, first:stop], weights_like(carried_BSR)[:, first:stop]]
        parts.append([*outputs, *torch.autograd.grad(outputs, part.leaves, weights)])
    joined = [torch.cat(tensors, 1) for tensors in list(zip(*parts, strict=True))[:4]]
    sums = [a + b for a, b in list(zip(*parts, strict=True))[4:]]
    expected = [y_BSO, carried_BSR, d_x_BSD, d_h_prev_BSR, *d_weights]
    assert_same([*joined, *sums], expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("unused", ["y", "carried"])
def test_either_result_may_go_unused(unused: str) -> None:
    inputs, wanted = draw(), []
    for run in (run_reference, run_fused):
        copied = inputs.copy()
        output = run(copied, Recurrence(SCALING))[unused == "y"]
        gradients = torch.autograd.grad(output, copied.leaves, weights_like(output), allow_unused=True)
        filled = (
            torch.zeros_like(leaf) if g is None else g
            for g, leaf in zip(gradients, copied.leaves, strict=True)
        )
        wanted.append([output, output, *filled])
    assert_same(wanted[1], wanted[0], TOLERANCES[torch.float64])


def test_gradients_of_gradients_are_refused() -> None:
    inputs = draw()
    y_BSO, _ = run_fused(inputs, Recurrence(SCALING))
    (gradient,) = torch.autograd.grad(y_BSO.square().sum(), inputs.lora_B_OR, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@dtypes
@pytest.mark.parametrize("drop", [False, True], ids=["no_dropout", "dropout"])
def test_x_z_and_the_state_received_are_all_that_is_kept(dtype: torch.dtype, drop: bool) -> None:
    inputs = draw(dtype=dtype)
    seeds = dropout_seeds(DROPOUT_SEEDS, 5) if drop else None
    own = (*inputs.leaves[2:], inputs.frozen_OD)
    recurrence = Recurrence(SCALING, dropout=DROPOUT)
    kept = kept_by(
        lambda: run_fused(inputs, recurrence, False, seeds), *own, *([] if seeds is None else [seeds])
    )
    pointers = [tensor.data_ptr() for tensor in kept]
    assert inputs.x_BSD.data_ptr() in pointers
    assert inputs.h_prev_BSR.data_ptr() in pointers
    others = [t for t in kept if t.data_ptr() not in (inputs.x_BSD.data_ptr(), inputs.h_prev_BSR.data_ptr())]
    assert [(tuple(t.shape), t.dtype) for t in others] == [((BATCH, 5, 4), dtype)], "z, and nothing else"


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operators make: neither views nor what is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            not func.is_view
            and not func._schema.is_mutable
            and func is not torch.ops.aten._unsafe_view.default
        ):
            self.sizes += [tensor.numel() for tensor in torch.utils._pytree.tree_leaves(result)]
        return result


@pytest.mark.parametrize("bias", [False, True])
def test_no_tensor_of_the_size_of_x_or_y_but_those_of_the_frozen_layer(bias: bool) -> None:
    tokens = 50
    inputs = draw(tokens)
    x_BSD, h_prev_BSR, lora_A_RD, lora_B_OR, *_ = inputs.leaves
    settings = settings_of(inputs, Recurrence(SCALING))
    added = torch.zeros(OUT_FEATURES, dtype=torch.float64) if bias else None
    with Allocations() as forward:
        x_BSD, (z_BSR,) = fused.down_project(x_BSD, [lora_A_RD])
        base_BSO = F.linear(x_BSD, inputs.frozen_OD, added)
        y_BSO, _ = fused.add_delta(base_BSO, z_BSR, h_prev_BSR, lora_B_OR, *settings)
    assert y_BSO.data_ptr() == base_BSO.data_ptr()
    assert forward.sizes.count(BATCH * tokens * OUT_FEATURES) == 1
    gradient = weights_like(y_BSO)
    kept = gradient.clone()
    with Allocations() as backward:
        torch.autograd.grad(y_BSO, inputs.leaves, gradient)
    sizes = [*forward.sizes, *backward.sizes]
    assert sizes.count(BATCH * tokens * OUT_FEATURES) == 1
    assert sizes.count(BATCH * tokens * FEATURES) == 1
    assert torch.equal(gradient, kept), "the gradient that came in was written into"


def test_an_x_without_gradient_gives_the_frozen_layer_none_to_work_out() -> None:
    inputs = draw()
    x_BSD, (z_BSR,) = fused.down_project(inputs.x_BSD.detach(), [inputs.lora_A_RD])
    assert z_BSR.requires_grad
    assert not F.linear(x_BSD, inputs.frozen_OD).requires_grad


@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16_model", "float32_model"])
def test_autocast_leaves_the_state_in_float32(wide: bool) -> None:
    inputs = draw(dtype=torch.float32 if wide else torch.bfloat16)

    def autocast(inputs: Inputs, recurrence: Recurrence) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y_BSO, carried_BSR = run_fused(inputs, recurrence)
        assert y_BSO.dtype == torch.bfloat16
        return y_BSO.to(inputs.x_BSD.dtype), carried_BSR

    recurrence = Recurrence(SCALING)
    got = outputs_and_gradients(autocast, inputs, recurrence)
    wanted = outputs_and_gradients(run_reference, inputs, recurrence)
    assert_same(got, wanted, TOLERANCES[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@normalizations
@carries
@dtypes
@pytest.mark.parametrize("drop", [False, True], ids=["no_dropout", "dropout"])
def test_on_cuda_it_is_what_it_is_on_the_cpu(
    normalization: str, carry: str, dtype: torch.dtype, drop: bool
) -> None:
    inputs = draw(129, 8, dtype)
    recurrence = Recurrence(SCALING, normalization, carry, DROPOUT, DROPOUT_ID)
    results = []
    for device in ("cuda", "cpu"):
        seeds = dropout_seeds(DROPOUT_SEEDS, 129).to(device) if drop else None
        found = outputs_and_gradients(run_fused, inputs.copy(device), recurrence, False, seeds)
        results.append([None if tensor is None else tensor.cpu() for tensor in found])
    assert_same(*results, TOLERANCES[dtype])
