"""Dropout without memory: whether an element is kept is a pure function of its position.

The position is (seed of the row, `dropout_id`, token in the row, component); an id is that of one adapter of
one decoder layer. So a backward pass, a recompute and any split of batch or layers over processes find the
mask that the forward pass had, and nothing is stored. CPU and CUDA, here and in Triton, give the same bits.

Shapes: B batch, S tokens, C components; int32 arithmetic wraps around.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# The finaliser of MurmurHash3 (public domain) as int32: shift, factor, shift, factor, shift.
SHIFTS = (16, 13, 16)
FACTORS = (0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32)
# Where the chain of hashes starts: 0 hashes to 0.
START = 0x5A17C9E3


class Dropout(NamedTuple):
    """How an adapter drops, seeds aside.

    Attributes:
        dropout_id: which adapter of the model it is.
        probability: of dropping.
        first_token: where the first of the tokens stands in its row, if the rows are split among processes.
    """

    dropout_id: int = 0
    probability: float = 0.0
    first_token: int = 0


def draw_seeds(num_rows: int, device: torch.device) -> Tensor:
    """Seeds [B] int64 from torch's default CPU generator, which gradient checkpointing restores."""
    return torch.randint(2**62, (num_rows,)).to(device)


def threshold(probability: float) -> int:
    """The int32 under which a hash falls with `probability`."""
    return min(round(probability * 2**32), 2**32 - 1) - 2**31


def keep_mask(
    seeds_B: Tensor, dropout_id: int, shape: tuple[int, ...], probability: float, first_token: int = 0
) -> Tensor:
    """Which elements are kept, bool of `shape` [...,S,C]; each is dropped with `probability`.

    Args:
        seeds_B: int64, one for each row of the batch, on the device of the mask.
        dropout_id: which adapter.
        shape: tokens and components last; what is before them counts as rows of the batch.
        probability: of dropping.
        first_token: where the first of the tokens stands in its row, if the rows are split among processes.
    """
    *rows, num_tokens, num_components = shape
    assert seeds_B.shape == (math.prod(rows),), "one seed for each row"
    keys = [_key(seed, dropout_id) for seed in seeds_B.tolist()]
    hash_ = torch.tensor(keys, dtype=torch.int32, device=seeds_B.device)
    for first, number in ((first_token, num_tokens), (0, num_components)):
        positions = torch.arange(first, first + number, dtype=torch.int32, device=seeds_B.device)
        hash_ = _mixed(hash_.unsqueeze(-1) ^ positions)
    return (hash_ >= threshold(probability)).view(shape)


def dropout(
    x_BSC: Tensor, seeds_B: Tensor, dropout_id: int, probability: float, first_token: int = 0
) -> Tensor:
    """x [...,S,C]: what `keep_mask` drops is 0, the rest divided by 1 - probability; its own gradient."""
    kept = keep_mask(seeds_B, dropout_id, tuple(x_BSC.shape), probability, first_token)
    return (x_BSC * kept).mul_(1 / (1 - probability))


def _key(seed: int, dropout_id: int) -> int:
    """The hash of an adapter's `dropout_id` and of both halves of a row's seed, as an int32."""
    hash_ = START
    for value in (dropout_id, seed, seed >> 32):
        hash_ = (hash_ ^ value) % 2**32
        for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
            hash_ = (hash_ ^ hash_ >> shift) * factor % 2**32
    return hash_ - 2**32 if hash_ >= 2**31 else hash_


def _mixed(hash_: Tensor) -> Tensor:
    for shift, factor in zip(SHIFTS, (*FACTORS, 1), strict=True):
        # int32 shifts draw the sign in; the mask makes a logical shift of it.
        hash_.bitwise_xor_((hash_ >> shift).bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            hash_.mul_(factor)
    return hash_
