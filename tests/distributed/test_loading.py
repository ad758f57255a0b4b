"""What ranks do together while they load: shards under ZeRO 3, halves of a table, one fingerprint."""

from __future__ import annotations

import pytest

from .conftest import WORLD_SIZES, Results
from .jobs import TIED, TOPOLOGIES

# Four layers, embedding, norm and head.
NUM_PARTS = 7


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
@pytest.mark.parametrize("job", [job for job in {**TOPOLOGIES, **TIED} if "zero 3" in job])
def test_zero_3_shards_each_part_before_the_next_is_filled(
    results: Results, num_ranks: int, job: str
) -> None:
    for whole_parts in results.found(num_ranks, "whole parts"):
        assert whole_parts[job] == [0] * (NUM_PARTS - job.startswith("tied"))


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_other_stages_of_zero_keep_what_is_loaded(results: Results, num_ranks: int) -> None:
    """Otherwise the test above would say little."""
    for whole_parts in results.found(num_ranks, "whole parts"):
        assert whole_parts["zero 2"] == list(range(NUM_PARTS))


def test_two_ranks_swap_the_halves_of_a_table(results: Results) -> None:
    assert results.found(2, "swapped") == [True, True]


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_the_fingerprint_is_taken_by_rank_0_alone(results: Results, num_ranks: int) -> None:
    first, *others = results.found(num_ranks, "fingerprints")
    # The job that is refused because its name is taken does not come so far.
    assert first == len(results.found(num_ranks, "whole parts")[0])
    assert others == [0] * (num_ranks - 1)
