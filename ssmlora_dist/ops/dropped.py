"""Products with what dropout leaves of x, for some of the tokens at a time: none costs a tensor of x's size.

To torch.compile, which would make a graph of all pieces, each is a single node, as
`torch.ops.ssmlora.dropped_product`. Shapes: T tokens, D in-features, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlora_dist.ops.operators import register_operator

# Elements that are dropped at a time: 64 MiB in bfloat16, a pass over which takes longer than its launch.
PIECE_ELEMENTS = 2**25


def dropped_product(
    x_TD: Tensor, seeds_T: Tensor, dropout_id: int, dropout: float, weight_RD: Tensor
) -> Tensor:
    """z = dropped(x) W^T [T,R].

    Args:
        x_TD: what is dropped from.
        seeds_T: int32, of the tokens.
        dropout_id: which adapter draws.
        dropout: its probability.
        weight_RD: W, in the dtype of x.
    """
    z = [
        F.linear(_dropped(x_TD[tokens], seeds_T[tokens], dropout_id, dropout), weight_RD)
        for tokens in _pieces(*x_TD.shape)
    ]
    return z[0] if len(z) == 1 else torch.cat(z)


def dropped_weight_gradient(
    x_TD: Tensor, seeds_T: Tensor, dropout_id: int, dropout: float, d_z_TR: Tensor, dtype: torch.dtype
) -> Tensor:
    """dW = dz^T dropped(x) [R,D] in `dtype`, in which pieces are added up; the rest as `dropped_product`."""
    d_weight: Tensor | None = None
    for tokens in _pieces(*x_TD.shape):
        read_TD = _dropped(x_TD[tokens], seeds_T[tokens], dropout_id, dropout)
        of_piece = product(d_z_TR[tokens].t(), read_TD, dtype)
        d_weight = of_piece if d_weight is None else d_weight.add_(of_piece)
        # Gone before there is another.
        del read_TD
    assert d_weight is not None
    return d_weight


def add_dropped_gradient_(
    d_x_TD: Tensor, seeds_T: Tensor, dropout_id: int, dropout: float, d_z_TR: Tensor, weight_RD: Tensor
) -> Tensor:
    """dx + dropped(dz W) [T,D], in the place of dx; the rest as `dropped_product`."""
    for tokens in _pieces(*d_x_TD.shape):
        own_TD = torch.mm(d_z_TR[tokens], weight_RD)
        d_x_TD[tokens].add_(_dropped(own_TD, seeds_T[tokens], dropout_id, dropout))
        del own_TD
    return d_x_TD


def add_dropped_gradient(
    d_x_TD: Tensor, seeds_T: Tensor, dropout_id: int, dropout: float, d_z_TR: Tensor, weight_RD: Tensor
) -> Tensor:
    """`add_dropped_gradient_` that leaves dx as it is."""
    copy_TD = d_x_TD.clone(memory_format=torch.contiguous_format)
    return add_dropped_gradient_(copy_TD, seeds_T, dropout_id, dropout, d_z_TR, weight_RD)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, accumulated and returned in `dtype` where the device can, else rounded in between."""
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _pieces(num_tokens: int, num_components: int) -> Iterator[slice]:
    """Which tokens are dropped together."""
    size = max(1, PIECE_ELEMENTS // num_components)
    return (slice(start, start + size) for start in range(0, max(1, num_tokens), size))


def _dropped(x_TD: Tensor, seeds_T: Tensor, dropout_id: int, dropout: float) -> Tensor:
    dropped: Tensor = torch.ops.ssmlora.dropout(x_TD, seeds_T, dropout_id, dropout)
    return dropped


_DROPOUT = "Tensor seeds, int dropout_id, float dropout"
register_operator(
    dropped_product,
    f"(Tensor x, {_DROPOUT}, Tensor weight) -> Tensor",
    lambda x, seeds, dropout_id, dropout, weight: x.new_empty(x.shape[0], weight.shape[0]),
)
register_operator(
    dropped_weight_gradient,
    f"(Tensor x, {_DROPOUT}, Tensor d_z, ScalarType dtype) -> Tensor",
    lambda x, seeds, dropout_id, dropout, d_z, dtype: x.new_empty(d_z.shape[1], x.shape[1], dtype=dtype),
)
register_operator(
    add_dropped_gradient,
    f"(Tensor d_x, {_DROPOUT}, Tensor d_z, Tensor weight) -> Tensor",
    lambda d_x, *_: d_x.new_empty(d_x.shape),
)
