"""Adapters as differentiable functions that keep almost nothing for the backward pass and add in place.

An adapter on a frozen linear layer is three calls:

    x, z = down_project(x, [lora_A])                          z = x W_a
    base = x W_0                                              the frozen layer, on the x that came back
    y, state = add_delta(base, z, state, lora_B, form, ...)   y = base + scaling u W_b, u by the form

Between forward and backward pass they hold x (the tensor itself: no copy, no cast), z and the state received;
all else is worked out again. The delta is added into `base`, and the gradient through W_a into the one that
the frozen layer sends to x: neither costs a tensor of its own, unless somebody else holds what it would go
into (`is_held`). Compiled, both are left to the compiler. What dropout makes of x, and of what goes back to
it, is there for some of the tokens at a time (`dropped.py`).

Products with W_a and W_b run in the dtype of x, state arithmetic in float32 (float64 for float64). Gradients
of gradients are not there. Shapes: B batch, S tokens, D in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import getrefcount
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmlora_dist.ops import dropped
from ssmlora_dist.ops.dropout import Dropout
from ssmlora_dist.ops.form import Form, Inputs, Parameters

# A view of what nobody else refers to: see `is_held`.
_LONE_VIEW = torch.empty(1).view(1)


def down_project(
    x_BSD: Tensor,
    weights: Sequence[Tensor],
    seeds: Tensor | None = None,
    dropout_id: int = 0,
    dropout: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """x, to be given to the frozen layers, and z = x W_a [B,S,R] for each of `weights`, in one product.

    Args:
        x_BSD: input of the frozen layers.
        weights: `lora_A` [R,D] of each adapter that reads x.
        seeds: of the dropout on what `weights` read, int32, one for each token [B,S]; None keeps everything.
        dropout_id: which adapter draws.
        dropout: its probability.
    """
    rng_args = (dropout_id, dropout)
    if not torch.is_grad_enabled():
        return x_BSD, list(_projections(x_BSD, seeds, rng_args, weights))
    through_BSD, *z = _DownProjection.apply(x_BSD, seeds, rng_args, *weights)  # type: ignore[no-untyped-call]
    # Otherwise the frozen layers would work out a gradient that nobody takes.
    return through_BSD if x_BSD.requires_grad else x_BSD, z


def is_held(tensor: Tensor, witness: object) -> bool:
    """Whether anybody but the caller can see `tensor` change: a hook that has kept it, or a view of it.

    Autograd asks the same of a gradient before it adds to it in place. Of how many references to an object
    Python knows differs from version to version: those to `witness` tell how many are the caller's. To a
    compiler, which decides itself what is done in place, every tensor is held.

    Args:
        tensor: what is to be changed in place.
        witness: an object to which the caller alone refers, by as many names as to `tensor`.
    """
    if torch.compiler.is_compiling():
        return True
    # What a view is of, it refers to itself.
    base: Any = tensor._base
    witness_of_base = _LONE_VIEW._base
    is_view = base is not None
    return (
        getrefcount(tensor) > getrefcount(witness)
        or tensor._use_count() > 1  # type: ignore[attr-defined]
        or (is_view and (getrefcount(base) > getrefcount(witness_of_base) or base._use_count() > 2))
        # One is that of the storage's own Python object.
        or torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2 + is_view
    )


def add_delta(
    base_BSO: Tensor,
    z_BSR: Tensor,
    state: Tensor | None,
    lora_B_OR: Tensor,
    form: Form,
    parameters: Parameters,
    scaling: float,
    seeds: Tensor | None = None,
    dropout: Dropout = Dropout(),  # noqa: B008 (immutable)
    in_place: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y = base + scaling u W_b [B,S,O], and the state handed on, of which `form` makes u and the latter.

    Args:
        base_BSO: the frozen layer's output, in the dtype of x.
        z_BSR: x W_a.
        state: received, [B,S,R] or, if the form reads all axes, [B,S,A,R]; detached, no gradient goes through
            it. None for a form without one.
        lora_B_OR: W_b transposed.
        form: what is computed in between.
        parameters: the form's, by name.
        scaling: of the adapter's output.
        seeds: of the form's dropout, int32, one for each token [B,S]; None keeps everything.
        dropout: which adapter drops, and with what probability.
        in_place: y takes the place of `base`, which is lost.

    Returns:
        y, and [B,S,R] in the dtype of `state`, or None for a form without one.
    """
    if torch.compiler.is_compiling() and type(form).backward is Form.backward:
        # The compiler itself finds what to keep and what to work out again.
        u_BSR, handed_on = form.run(Inputs(z_BSR, state, parameters, scaling, seeds, dropout))
        u_TR, right_RO = _rows(u_BSR), lora_B_OR.to(z_BSR.dtype).t()
        return _add_product(base_BSO, u_TR, right_RO, scaling, in_place=False), handed_on
    settings = (form, tuple(parameters), scaling, dropout)
    y_BSO, handed_on = _Delta.apply(  # type: ignore[no-untyped-call]
        settings, in_place, base_BSO, z_BSR, state, lora_B_OR, seeds, *parameters.values()
    )
    return y_BSO, handed_on


class _DownProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seeds: Tensor | None, rng_args: tuple[int, float], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.rng_args = rng_args
        ctx.save_for_backward(x, seeds, *weights)
        return x, *_projections(x, seeds, rng_args, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor | None, *d_z: Tensor | None) -> tuple[Tensor | None, ...]:
        x, seeds, *weights = ctx.saved_tensors
        # Each z has one reader, and that is ours: nobody else holds the gradient that comes back.
        in_place = d_x is not None and d_z[0] is not None and not is_held(d_x, d_z[0])
        rank = weights[0].shape[0]
        d_zs = [x.new_zeros((*x.shape[:-1], rank)) if d is None else d for d in d_z]
        # Under autocast x may be wider than z.
        d_z_TR = _rows(_stacked(d_zs, -1)).to(x.dtype)
        rows, dtype = _rows(x), weights[0].dtype
        dropout_id, dropout = ctx.rng_args
        dropping = None if seeds is None else (seeds.reshape(-1), dropout_id, dropout)
        if dropping is None:
            d_weight = dropped.product(d_z_TR.t(), rows, dtype)
        else:
            d_weight = _with_dropout().dropped_weight_gradient(rows, *dropping, d_z_TR, dtype)
        if ctx.needs_input_grad[0]:
            weight = _stacked(weights).to(x.dtype)
            if d_x is None:
                d_x, in_place = x.new_zeros(x.shape), not torch.compiler.is_compiling()
            d_x = d_x.contiguous()
            if dropping is None:
                d_x = _add_product(d_x, d_z_TR, weight, in_place=in_place)
            elif in_place:
                dropped.add_dropped_gradient_(_rows(d_x), *dropping, d_z_TR, weight)
            else:
                added = _with_dropout().add_dropped_gradient(_rows(d_x), *dropping, d_z_TR, weight)
                d_x = added.view(x.shape)
        return d_x, None, None, *d_weight.split(rank)


class _Delta(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Form, tuple[str, ...], float, Dropout], in_place: bool, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        # All in one: where as many are given as there are names, torch 2.13's compiler takes one for `ctx`.
        base, z, state, lora_B, seeds, *parameters = tensors
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        ctx.save_for_backward(z, state, lora_B, seeds, *parameters)
        form, names, scaling, dropout = settings
        by_name = dict(zip(names, parameters, strict=True))
        u, handed_on = form.forward(Inputs(z, state, by_name, scaling, seeds, dropout))
        outer = 1.0 if form.scales_in_forward else scaling
        return _add_product(base, _rows(u), lora_B.to(z.dtype).t(), outer, in_place=in_place), handed_on

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_handed_on: Tensor | None) -> tuple[Tensor | None, ...]:
        z, state, lora_B, seeds, *parameters = ctx.saved_tensors
        form, names, scaling, dropout = ctx.settings
        if d_y is None:
            d_y = z.new_zeros((*z.shape[:-1], lora_B.shape[0]))
        d_u = torch.mm(_rows(d_y), lora_B.to(z.dtype)).view(z.shape)
        if not form.scales_in_forward:
            d_u.mul_(scaling)
        by_name = dict(zip(names, parameters, strict=True))
        inputs = Inputs(z, state, by_name, scaling, seeds, dropout)
        u, d_z, d_state, d_parameters = form.backward(inputs, d_u, d_handed_on, ctx.needs_input_grad[4])
        scaled = u if form.scales_in_forward else u * scaling
        d_B = dropped.product(_rows(d_y).t(), _rows(scaled), lora_B.dtype)
        return None, None, d_y, d_z, d_state, d_B, None, *d_parameters


def _projections(
    x: Tensor, seeds: Tensor | None, rng_args: tuple[int, float], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    weight, rank = _stacked(weights).to(x.dtype), weights[0].shape[0]
    if seeds is None:
        return F.linear(x, weight).split(rank, -1)
    z_TR: Tensor = _with_dropout().dropped_product(_rows(x), seeds.reshape(-1), *rng_args, weight)
    return z_TR.view(*x.shape[:-1], -1).split(rank, -1)


def _with_dropout() -> Any:
    """The functions of `dropped`, to the compiler as operators."""
    return torch.ops.ssmlora if torch.compiler.is_compiling() else dropped


def _add_product(
    target: Tensor, left_TR: Tensor, right_RO: Tensor, scaling: float = 1.0, *, in_place: bool
) -> Tensor:
    """target + scaling left right; `in_place` unless a compiler is to see to that."""
    rows = target.view(-1, target.shape[-1])
    if torch.compiler.is_compiling() or not in_place:
        return torch.addmm(rows, left_TR, right_RO, alpha=scaling).view(target.shape)
    rows.addmm_(left_TR, right_RO, alpha=scaling)
    return target


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
