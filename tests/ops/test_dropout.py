"""Dropout by counting: its bits, how evenly they fall, and that nothing but an element's position decides."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ssmlora_dist.ops.dropout import START, draw_seeds, dropout, keep_mask
from tests.tiny import dropout_seeds

SEEDS = [0, 1, 2**40 + 7, 2**62 - 1, -5]
# A share that is further from its probability than this many standard deviations is none: one in 3.5 million.
DEVIATIONS = 5.0


def mask(
    seed: int = 3, dropout_id: int = 2, shape: tuple[int, ...] = (4, 256, 8), probability: float = 0.5
) -> Tensor:
    """Of samples whose seeds count up from `seed`."""
    seeds_BS = dropout_seeds(range(seed, seed + shape[0]), shape[1])
    return keep_mask(seeds_BS, dropout_id, shape[2], probability)


def by_hand(*parts: int) -> int:
    """The hash in Python's own integers."""
    value = START
    for part in parts:
        value = (value ^ part) & 0xFFFFFFFF
        value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
        value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
        value ^= value >> 16
    return value - 2**32 if value >= 2**31 else value


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bits_are_those_of_the_hash(seed: int) -> None:
    shape, dropout_id = (3, 5, 4), 11
    positions = list(itertools.product(*(range(size) for size in shape)))
    for probability in (0.5, 0.1):
        border = round(probability * 2**32) - 2**31
        expected = torch.tensor(
            [
                by_hand(dropout_id, by_hand(seed + row, seed + row >> 32, token), component) >= border
                for row, token, component in positions
            ]
        ).view(shape)
        assert torch.equal(mask(seed, dropout_id, shape, probability), expected)


def test_the_bits_do_not_change_from_release_to_release() -> None:
    """A resumed run draws what the uninterrupted one would have."""
    bits = mask(seed=2**40 + 7, dropout_id=9, shape=(1, 4, 8)).flatten().int().tolist()
    assert hex(int("".join(map(str, bits)), 2)) == "0x9b7e7ab2"


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_share_dropped_is_the_probability_along_every_axis(seed: int, probability: float) -> None:
    dropped = ~mask(seed, shape=(8, 512, 16), probability=probability)
    for axis in range(3):
        shares = dropped.float().mean(dim=[other for other in range(3) if other != axis])
        count = dropped.numel() / dropped.shape[axis]
        deviations = (shares - probability).abs() / math.sqrt(probability * (1 - probability) / count)
        assert deviations.max() < DEVIATIONS, f"axis {axis}: {deviations.max():.1f} standard deviations"


NEIGHBOURS = {
    "seed": (mask(seed=3), mask(seed=30)),
    "upper half of the seed": (mask(seed=3), mask(seed=3 + 2**32)),
    "dropout_id": (mask(dropout_id=2), mask(dropout_id=3)),
    "row": (mask()[:-1], mask()[1:]),
    "token": (mask()[:, :-1], mask()[:, 1:]),
    "component": (mask()[:, :, :-1], mask()[:, :, 1:]),
    "row and token": (mask()[:-1, 1:], mask()[1:, :-1]),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_independent(pair: tuple[Tensor, Tensor]) -> None:
    equal = (pair[0] == pair[1]).float()
    deviations = abs(equal.mean().item() - 0.5) / math.sqrt(0.25 / equal.numel())
    assert deviations < DEVIATIONS, f"{deviations:.1f} standard deviations"


def test_an_element_does_not_know_what_is_around_it() -> None:
    whole = mask(shape=(4, 32, 8))
    assert torch.equal(mask(shape=(2, 32, 8)), whole[:2])
    assert torch.equal(mask(seed=4, shape=(3, 32, 8)), whole[1:])
    assert torch.equal(mask(shape=(4, 7, 8)), whole[:, :7])
    assert torch.equal(mask(shape=(4, 32, 3)), whole[:, :, :3])
    seeds_BS = dropout_seeds(range(3, 7), 32)
    assert torch.equal(keep_mask(seeds_BS[:, 7:], 2, 8, 0.5), whole[:, 7:])
    x = torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropout(x[:, 7:], seeds_BS[:, 7:], 2, 0.5), dropout(x, seeds_BS, 2, 0.5)[:, 7:])


def test_more_is_dropped_with_a_higher_probability_and_nothing_else_changes() -> None:
    few, many = mask(probability=0.1), mask(probability=0.4)
    assert not (many & ~few).any()
    assert mask(probability=0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept_is_scaled_up(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    seeds_BS = dropout_seeds([3, 9], 5)
    kept = keep_mask(seeds_BS, 1, 7, 0.25)
    dropped = dropout(x, seeds_BS, 1, 0.25)
    assert dropped.dtype == dtype
    assert torch.equal(dropped[~kept], torch.zeros_like(dropped[~kept]))
    torch.testing.assert_close(dropped[kept], x[kept] / 0.75)
    assert 0 < (~kept).sum() < kept.numel()


def test_seeds_follow_torchs_own_generator() -> None:
    torch.manual_seed(5)
    first, second = (draw_seeds((1, 3), torch.device("cpu")) for _ in range(2))
    assert first.dtype == torch.int32
    assert len({*first.flatten().tolist(), *second.flatten().tolist()}) == 6
    torch.manual_seed(5)
    assert torch.equal(draw_seeds((1, 3), torch.device("cpu")), first)
