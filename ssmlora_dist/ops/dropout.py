"""Dropout without memory: whether an element is kept is a pure function of its position.

The position is (seed of the token, `dropout_id`, component); an id is that of one adapter of one decoder
layer, and the seed of a token is one of its sample's seed and of its place in the sample. So a backward pass,
a recompute, packed rows and any split of batch, sequence or layers over processes find the mask that the
forward pass had, and nothing is stored. CPU and CUDA, here and in Triton, give the same bits.

Shapes: B batch, S tokens, C components; int32 arithmetic wraps around.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    dropout_id: int = 0
    probability: float = 0.0


def token_seeds(sample_seed: int, num_tokens: int) -> Tensor:
    """The seeds [S] int32 of a sample's tokens, on the CPU, from an int64 seed of its own."""
    positions = torch.arange(num_tokens, dtype=torch.int32)
    return _mixed(positions ^ _key(sample_seed, sample_seed >> 32))


def draw_seeds(shape: Sequence[int], device: torch.device) -> Tensor:
    """Seeds int32 of `shape` from torch's default CPU generator, which gradient checkpointing restores."""
    return torch.randint(-(2**31), 2**31, tuple(shape), dtype=torch.int32).to(device)


def threshold(probability: float) -> int:
    """The int32 under which a hash falls with `probability`."""
    return min(round(probability * 2**32), 2**32 - 1) - 2**31


def keep_mask(seeds: Tensor, dropout_id: int, num_components: int, probability: float) -> Tensor:
    """Which elements are kept, bool [...,C]; each is dropped with `probability`.

    Args:
        seeds: of the tokens, [...] int32, on the device of the mask.
        dropout_id: which adapter.
        num_components: C.
        probability: of dropping.
    """
    hash_ = _mixed(seeds ^ _key(dropout_id))
    components = torch.arange(num_components, dtype=torch.int32, device=seeds.device)
    return _mixed(hash_.unsqueeze(-1) ^ components) >= threshold(probability)


def dropout(x_BSC: Tensor, seeds_BS: Tensor, dropout_id: int, probability: float) -> Tensor:
    """x [...,S,C]: what `keep_mask` drops is 0, the rest divided by 1 - probability; its own gradient."""
    kept = keep_mask(seeds_BS, dropout_id, x_BSC.shape[-1], probability)
    return (x_BSC * kept).mul_(1 / (1 - probability))


def _key(*values: int) -> int:
    """The hash of some numbers, of each its lower 32 bits, as an int32."""
    hash_ = START
    for value in values:
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
