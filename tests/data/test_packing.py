"""Which samples share a row."""

from __future__ import annotations

import random

import pytest

from ssmlora_dist.data.packing import pack

CAPACITY = 100


def drawn(seed, number=300):
    rng = random.Random(seed)
    return [rng.choice((rng.randint(1, 20), rng.randint(1, CAPACITY))) for _ in range(number)]


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_is_in_one_row_that_has_room_for_it(seed):
    lengths = drawn(seed)
    rows = pack(lengths, range(len(lengths)), CAPACITY)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    fill = [sum(lengths[sample] for sample in row) for row in rows]
    assert max(fill) <= CAPACITY
    # No two rows could have been one.
    assert sum(sorted(fill)[:2]) > CAPACITY


def by_looking_at_every_row(lengths):
    """Best-fit decreasing, as it is defined: by how full the rows are."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, fill in enumerate(rows) if fill + length <= CAPACITY]
        if fitting:
            rows[max(fitting, key=lambda index: rows[index])] += length
        else:
            rows.append(length)
    return sorted(rows)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_best_fit_decreasing_whatever_the_order(seed):
    lengths = drawn(seed)
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    for given in (range(len(lengths)), order):
        fill = sorted(sum(lengths[sample] for sample in row) for row in pack(lengths, given, CAPACITY))
        assert fill == by_looking_at_every_row(lengths)


def test_the_order_decides_among_equals():
    rows = pack([50, 50, 50, 50], [3, 0, 2, 1], CAPACITY)
    assert rows == [[3, 0], [2, 1]]
