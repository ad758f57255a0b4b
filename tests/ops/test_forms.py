"""I10 for every form: its own path against its reference under autograd, outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlora_dist.ops import dropped, fused
from ssmlora_dist.ops.constant import Constant
from ssmlora_dist.ops.dropout import Dropout
from ssmlora_dist.ops.form import Form, Inputs
from ssmlora_dist.ops.gated import Gated
from ssmlora_dist.ops.lora import LoRA
from ssmlora_dist.ops.lora.reference import lora
from ssmlora_dist.ops.registry import form_named, form_names
from ssmlora_dist.ops.ssmlora import SSMLoRA
from tests.ops.ssmlora.one_module import TOLERANCES, kept_by
from tests.ops.ssmlora.recurrence import weights_like
from tests.own_forms import Fading, Mixing
from tests.tiny import dropout_seeds

SEED = 31
OWN = [name for name in form_names() if form_named(name).__module__.startswith("ssmlora_dist.")]
BATCH, FEATURES, OUT_FEATURES, NUM_AXES, SCALING = 3, 12, 10, 3, 1.25
# Of as many tokens as any test has.
SEEDS = dropout_seeds([2**40 + 7, -5, 3], 64)
DROPOUT = Dropout(dropout_id=5, probability=0.3)


FORMS = [*map(form_named, OWN), Fading, Mixing]
every_form = pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.name)
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def form_of(kind: type[Form], rank: int) -> Form:
    return kind(rank=rank, axis=1, num_axes=NUM_AXES)


def draw(form: Form, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves by name: base and x, z's and u's matrices, the state, the parameters."""
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(shape: tuple[int, ...], to: torch.dtype, scale: float = 1.0) -> Tensor:
        drawn = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(to).requires_grad_()

    rank, axes = form.rank, (NUM_AXES,) if form.reads_all_axes else ()
    leaves = {
        "x": normal((BATCH, tokens, FEATURES), dtype),
        "base": normal((BATCH, tokens, OUT_FEATURES), dtype),
        "lora_A": normal((rank, FEATURES), wide, FEATURES**-0.5),
        "lora_B": normal((OUT_FEATURES, rank), wide, rank**-0.5),
    }
    if form.has_state:
        leaves["state"] = normal((BATCH, tokens, *axes, rank), dtype)
    for name, start in form.start_values().items():
        leaves[name] = normal(tuple(start.shape), wide, 0.5 * rank**-0.5)
    return leaves


def by_form(form: Form, leaves: dict[str, Tensor], seeds: Tensor | None) -> list[Tensor]:
    """y, and the state handed on if there is one, as an adapter computes them."""
    own = {name: leaves[name] for name in form.start_values()}
    seeds = None if seeds is None else seeds[:, : leaves["x"].shape[1]]
    read = seeds if form.drops_input else None
    x, (z,) = fused.down_project(leaves["x"], [leaves["lora_A"]], read, *DROPOUT)
    # Nothing of `base` is a leaf to be lost: it is added to in place.
    base = leaves["base"] + 0 * x.sum()
    inner = None if form.drops_input else seeds
    y, state = fused.add_delta(
        base, z, leaves.get("state"), leaves["lora_B"], form, own, SCALING, inner, DROPOUT
    )
    return [y] if state is None else [y, state]


def by_reference(form: Form, leaves: dict[str, Tensor], seeds: Tensor | None) -> list[Tensor]:
    """The same by the plain formula, all of it left to autograd."""
    own = {name: leaves[name] for name in form.start_values()}
    dtype = leaves["x"].dtype
    read = leaves["x"]
    seeds = None if seeds is None else seeds[:, : read.shape[1]]
    if seeds is not None and form.drops_input:
        read = read * torch.ops.ssmlora.dropout(torch.ones_like(read), seeds, *DROPOUT)
    z = F.linear(read, leaves["lora_A"].to(dtype))
    inputs = Inputs(z, leaves.get("state"), own, SCALING, None if form.drops_input else seeds, DROPOUT)
    u, state = form.run(inputs)
    y = leaves["base"] + SCALING * F.linear(u, leaves["lora_B"].to(dtype))
    return [y] if state is None else [y, state]


def results(run: Any, form: Form, leaves: dict[str, Tensor], seeds: Tensor | None) -> dict[str, Tensor]:
    outputs = run(form, leaves, seeds)
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [weights_like(output) for output in outputs], allow_unused=True
    )
    named = dict(zip([*leaves, "y", "state handed on"], [*gradients, *outputs], strict=False))
    return {name: tensor.detach() for name, tensor in named.items() if tensor is not None}


def assert_is_its_reference(form: Form, tokens: int, dtype: torch.dtype, seeds: Tensor | None) -> None:
    leaves = draw(form, tokens, dtype)
    got = results(by_form, form, leaves, seeds)
    wanted = results(by_reference, form, leaves, seeds)
    assert got.keys() == wanted.keys() == {*leaves, "y", *(["state handed on"] if form.has_state else [])}
    for name, expected in wanted.items():
        assert got[name].dtype == expected.dtype, name
        largest = expected.abs().max().double().clamp(min=1e-30)
        error = ((got[name].double() - expected.double()).abs().max() / largest).item()
        assert error <= TOLERANCES[dtype], f"{name}: relative error {error:.1e}"


@every_form
@dtypes
@pytest.mark.parametrize("seeds", [None, SEEDS], ids=["no_dropout", "dropout"])
def test_i10_every_form(kind: type[Form], dtype: torch.dtype, seeds: Tensor | None) -> None:
    assert_is_its_reference(form_of(kind, 4), 5, dtype, seeds)


@every_form
# From 3 on: an rms of one component and a minmax of two are constants; their gradient is rounding.
@pytest.mark.parametrize("rank", [3, 7, 32])
@pytest.mark.parametrize("tokens", [1, 17])
def test_i10_every_size(kind: type[Form], rank: int, tokens: int) -> None:
    assert_is_its_reference(form_of(kind, rank), tokens, torch.float64, SEEDS)


def test_i10_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped for four tokens at a time: 51 of them, of three rows."""
    monkeypatch.setattr(dropped, "PIECE_ELEMENTS", 4 * FEATURES + 5)
    assert_is_its_reference(LoRA(rank=4), 17, torch.float64, SEEDS)


@every_form
@pytest.mark.parametrize("seeds", [None, SEEDS], ids=["no_dropout", "dropout"])
def test_gradcheck(kind: type[Form], seeds: Tensor | None) -> None:
    form = form_of(kind, 4)
    leaves = draw(form, 2, torch.float64)

    def outputs(*moved: Tensor) -> tuple[Tensor, ...]:
        return tuple(by_form(form, dict(zip(leaves, moved, strict=True)), seeds))

    assert torch.autograd.gradcheck(outputs, tuple(leaves.values()))


@every_form
def test_z_and_the_state_received_are_all_that_is_kept(kind: type[Form]) -> None:
    form = form_of(kind, 4)
    leaves = draw(form, 5, torch.bfloat16)
    _, (z,) = fused.down_project(leaves["x"], [leaves["lora_A"]])
    own = {name: leaves[name] for name in form.start_values()}
    base = leaves["base"].detach()
    kept = kept_by(
        lambda: fused.add_delta(base, z, leaves.get("state"), leaves["lora_B"], form, own, SCALING),
        leaves["lora_B"],
        *own.values(),
    )
    expected = [z, *([leaves["state"]] if form.has_state else [])]
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in expected}


@pytest.mark.parametrize("kind", [kind for kind in FORMS if kind.has_state], ids=lambda kind: kind.name)
def test_a_form_that_is_detached_sends_nothing_back(kind: type[Form]) -> None:
    form = form_of(kind, 4)
    leaves = draw(form, 3, torch.float32)
    leaves["state"] = leaves["state"].detach()
    outputs = by_form(form, leaves, SEEDS)
    weights = [weights_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, [leaves["x"], leaves["lora_A"]], weights)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@every_form
def test_autocast_leaves_the_state_in_float32(kind: type[Form]) -> None:
    form = form_of(kind, 4)
    leaves = draw(form, 5, torch.float32)
    own = {name: leaves[name] for name in form.start_values()}
    z = F.linear(leaves["x"], leaves["lora_A"]).detach().requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            inputs = Inputs(z, leaves.get("state"), own, SCALING, None, DROPOUT)
            u, state = form.forward(inputs)
            d_state = None if state is None else torch.ones_like(state)
            *rest, d_own = form.backward(inputs, torch.ones_like(u), d_state, form.has_state)
        found.append([tensor for tensor in (u, state, *rest, *d_own) if tensor is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", [Gated, Constant])
@dtypes
def test_a_closed_form_is_lora_bit_for_bit(kind: type[Form], dtype: torch.dtype) -> None:
    """Of two adapters in a row: y and what of it trains LoRA."""
    form, plain = form_of(kind, 4), LoRA(rank=4)
    leaves = draw(form, 7, dtype)
    with torch.no_grad():
        leaves["state_gate" if kind is Gated else "state_constant"].zero_()
    got, wanted = results(by_form, form, leaves, None), results(by_form, plain, leaves | {}, None)
    if form.has_state:
        # Further adapters on the axis are closed as well: they send zeros back.
        outputs = by_form(form, leaves, None)
        names = ["x", "base", "lora_A", "lora_B"]
        weights = [weights_like(outputs[0]), torch.zeros_like(outputs[1])]
        gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], weights)
        got = dict(zip(names, gradients, strict=True)) | {"y": outputs[0]}
    for name in ("y", "x", "base", "lora_A", "lora_B"):
        assert torch.equal(got[name], wanted[name]), name


def test_lora_is_its_reference() -> None:
    leaves = draw(LoRA(rank=4), 5, torch.float64)
    mask = torch.ops.ssmlora.dropout(torch.ones_like(leaves["x"]), SEEDS[:, :5], *DROPOUT)
    [got] = by_form(LoRA(rank=4), leaves, SEEDS)
    given = (leaves[name] for name in ("x", "base", "lora_A", "lora_B"))
    expected = lora(*given, scaling=SCALING, dropout_mask_BSD=mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCES[torch.float64])


def test_rolled_is_ssmlora_on_the_state_of_the_next_row() -> None:
    rolled, plain = form_of(form_named("rolled"), 4), form_of(SSMLoRA, 4)
    leaves = draw(rolled, 5, torch.float32)
    y, state = by_form(rolled, leaves, SEEDS)
    moved = leaves | {"state": leaves["state"].detach()[[1, 2, 0]]}
    expected_y, expected_state = by_form(plain, moved, SEEDS)
    assert torch.equal(y, expected_y)
    assert torch.equal(state, expected_state)


def test_ssmlora_is_written_out_bit_for_bit() -> None:
    """What the paper's form computed before there were others, with its own operations in their order."""
    form = SSMLoRA(rank=4)
    leaves = draw(form, 5, torch.float32)
    got = results(by_form, form, leaves, SEEDS)
    x, g, b, c, d = (leaves[k].detach() for k in ("x", "state", "lora_B", "state_transition", "state_input"))
    z = F.linear(x, leaves["lora_A"].detach()).view(-1, 4)
    g, x = g.view(-1, 4), x.view(-1, FEATURES)
    h = torch.addmm(g, g, c).addmm_(z, d)
    low, high = torch.aminmax(h, dim=-1, keepdim=True)
    divisor = (high - low) + 1e-8
    n = (h - low) / divisor
    mask = torch.ops.ssmlora.dropout(torch.ones(BATCH, 5, 4), SEEDS[:, :5], *DROPOUT).view(-1, 4)
    u = torch.addcmul(z, n, mask) * SCALING
    y = torch.addmm(leaves["base"].detach().view(-1, OUT_FEATURES), u, b.t())
    assert torch.equal(got["y"].view(y.shape), y)
    assert torch.equal(got["state handed on"].view(n.shape), n)

    d_y, d_n = weights_like(got["y"]).view(y.shape), weights_like(got["state handed on"]).view(n.shape)
    d_u = torch.mm(d_y, b) * SCALING
    d_n = d_u * mask + d_n
    s_0, s_1 = d_n.sum(-1, keepdim=True), (d_n * n).sum(-1, keepdim=True)
    d_h = d_n.scatter_add(-1, h.min(-1, keepdim=True).indices, s_1 - s_0)
    d_h = d_h.scatter_add(-1, h.max(-1, keepdim=True).indices, -s_1) / divisor
    d_z = torch.addmm(d_u, d_h, d.t())
    expected = {
        "lora_B": torch.mm(d_y.t(), u),
        "state_transition": torch.mm(g.t(), d_h),
        "state_input": torch.mm(z.t(), d_h),
        "state": torch.addmm(d_h, d_h, c.t()),
        "lora_A": torch.mm(d_z.t(), x),
    }
    for name, gradient in expected.items():
        assert torch.equal(got[name].view(gradient.shape), gradient), name
