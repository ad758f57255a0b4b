"""Tensors of which ranks hold parts, put together in host memory: no device needs room for the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """A part of a tensor.

    Attributes:
        kind: of the tensor, such as `exp_avg`; empty: a parameter itself.
        name: of the parameter.
        shape: of the whole.
        begin: of the part, counted in the flat tensor.
        values: of it, flat, on the CPU; what reaches beyond the whole is padding.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    begin: int
    values: Tensor


def piece(
    name: str, values: Tensor, *, kind: str = "", shape: Iterable[int] | None = None, begin: int = 0
) -> Piece:
    """A copy of `values`, by default of a whole tensor."""
    whole = tuple(values.shape if shape is None else shape)
    return Piece(kind, name, whole, begin, values.detach().to("cpu", copy=True).flatten())


def put_together(pieces: Iterable[Piece]) -> dict[str, dict[str, Tensor]]:
    """The whole tensors by kind and name; names in order."""
    wholes: dict[str, dict[str, Tensor]] = {}
    missing: dict[tuple[str, str], int] = {}
    for kind, name, shape, begin, values in sorted(pieces, key=lambda item: item[:2]):
        by_name = wholes.setdefault(kind, {})
        if name not in by_name:
            by_name[name] = torch.empty(shape, dtype=values.dtype)
            missing[kind, name] = by_name[name].numel()
        flat = by_name[name].view(-1)[begin : begin + len(values)]
        flat.copy_(values[: len(flat)])
        missing[kind, name] -= len(flat)
    assert not any(missing.values()), f"parts are missing or there twice: {missing}"
    return wholes
