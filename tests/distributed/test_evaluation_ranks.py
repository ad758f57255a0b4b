"""Evaluation on one rank, on two, and on two that are killed and started again: one result file."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from ssmlora_dist.evaluation.item_rows import PARTS_DIRECTORY, RESULTS_FILE

from ..launch.processes import Finished, finish, rank_variables
from .evaluation_worker import NUM_ITEMS

NEVER = "-1"


def start(directory: Path, *runs: tuple[str, int, str]) -> list[Finished]:
    """Runs side by side: each a directory, a number of ranks, and the batches after which they die."""
    commands: list[list[str]] = []
    variables: list[dict[str, str]] = []
    for name, num_ranks, die_after in runs:
        commands += [["-m", "tests.distributed.evaluation_worker", name, die_after]] * num_ranks
        variables += rank_variables(num_ranks)
    return finish(commands, directory, variables)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what the runs left, whole and resumed."""
    directory = tmp_path_factory.mktemp("evaluations")
    ranks = start(directory, ("one", 1, NEVER), ("two", 2, NEVER), ("killed", 2, "4"))
    codes = [rank.exit_code for rank in ranks]
    assert codes == [0, 0, 0, -signal.SIGKILL, -signal.SIGKILL], "\n".join(rank.stderr for rank in ranks)
    assert not (directory / "killed" / RESULTS_FILE).exists()
    [resumed] = start(directory, ("killed", 1, NEVER))
    assert resumed.exit_code == 0, resumed.stderr
    return directory


def part_rows(directory: Path) -> dict[str, int]:
    """Rows in each rank's own file."""
    parts = sorted((directory / PARTS_DIRECTORY).iterdir())
    return {part.name: len(part.read_text().splitlines()) for part in parts}


def test_two_ranks_write_the_file_of_one(directory: Path) -> None:
    whole = (directory / "one" / RESULTS_FILE).read_bytes()
    assert len(whole.splitlines()) == 2 * NUM_ITEMS
    assert all("scores" in json.loads(line) for line in whole.splitlines())
    assert (directory / "two" / RESULTS_FILE).read_bytes() == whole
    shares = part_rows(directory / "two")
    assert sum(shares.values()) == 2 * NUM_ITEMS
    assert min(shares.values()) > NUM_ITEMS / 2, "the ranks share the items"


def test_killed_and_resumed_on_another_number_of_ranks_it_writes_the_same_file(directory: Path) -> None:
    assert (directory / "killed" / RESULTS_FILE).read_bytes() == (
        directory / "one" / RESULTS_FILE
    ).read_bytes()
    shares = part_rows(directory / "killed")
    assert sum(shares.values()) == 2 * NUM_ITEMS, "what was done before is not done again"
    assert shares["rank-1.jsonl"] > 4, "both ranks had done some"
