"""Parts of tensors put together, and that what ranks agree on never lies on a device."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ssmlora_dist.distributed.optimizer_state import OptimizerState, joined_state
from ssmlora_dist.distributed.pieces import Piece, piece, put_together
from ssmlora_dist.distributed.sequence import SequenceGroup

WHOLE = torch.arange(10.0).view(2, 5)


def shards(number: int, kind: str = "") -> list[Piece]:
    """Of as many ranks, as ZeRO 3 cuts them: the last ones filled up with zeros."""
    size = -(-WHOLE.numel() // number)
    padded = torch.zeros(size * number)
    padded[: WHOLE.numel()] = WHOLE.flatten()
    return [
        piece("w", padded[k * size : (k + 1) * size], kind=kind, shape=WHOLE.shape, begin=k * size)
        for k in range(number)
    ]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 16])
def test_shards_give_the_whole(number: int) -> None:
    found = put_together(reversed(shards(number)))
    assert found.keys() == {""}
    assert torch.equal(found[""]["w"], WHOLE)


def test_a_piece_is_a_copy_and_names_are_in_order() -> None:
    source = torch.zeros(2)
    pieces = [piece("b", source), piece("a", torch.ones(())), *shards(2, "exp_avg")]
    source += 1
    found = put_together(pieces)
    assert list(found[""]) == ["a", "b"]
    assert found[""]["b"].tolist() == [0.0, 0.0]
    assert found[""]["a"].shape == ()
    assert torch.equal(found["exp_avg"]["w"], WHOLE)


@pytest.mark.parametrize("wrong", [shards(3)[:2], [*shards(3), shards(3)[0]]], ids=["missing", "twice"])
def test_parts_that_are_not_the_whole_are_noticed(wrong: list[Piece]) -> None:
    with pytest.raises(AssertionError, match="missing or there twice"):
        put_together(wrong)


def test_a_rank_that_is_told_nothing_has_an_empty_state() -> None:
    assert joined_state([]) == OptimizerState(0, {})
    state = joined_state([(4, shards(2, "exp_avg")[:1]), (4, shards(2, "exp_avg")[1:])])
    assert state.num_updates == 4
    assert torch.equal(state.tensors["exp_avg"]["w"], WHOLE)


class Scores(NamedTuple):
    """As `models.loss.Scores`, of the rows of a batch."""

    loss_sums: Tensor
    num_targets: Tensor
    exact: Tensor


def test_scores_of_shared_rows_are_joined_in_host_memory() -> None:
    mine = [Scores(torch.tensor([1.5, 2.0]), torch.tensor([3, 1]), torch.tensor([True, True]))]
    others = {  # By rank; ranks 2 and 3 share rows.
        0: [torch.full((3, 2), 9.0, dtype=torch.float64)],
        1: [torch.full((3, 2), 9.0, dtype=torch.float64)],
        2: [torch.tensor([[0.5, 1.0], [2.0, 2.0], [1.0, 0.0]], dtype=torch.float64)],
    }
    gathered: list[torch.device] = []

    def gather(values: list[Tensor]) -> list[list[Tensor]]:
        gathered.extend(value.device for value in values)
        return [*others.values(), values]

    group = object.__new__(SequenceGroup)
    group.size = 2
    context: Any = SimpleNamespace(rank=3, gather=gather)
    [joined] = group.join(mine, context)
    assert joined.loss_sums.tolist() == [2.0, 3.0]
    assert joined.num_targets.tolist() == [5, 3]
    assert joined.exact.tolist() == [True, False]
    assert [part.dtype for part in joined] == [torch.float32, torch.int64, torch.bool]
    assert gathered == [torch.device("cpu")]


def test_only_the_context_and_data_use_collectives_of_our_own() -> None:
    """Numbers to agree on go through `DistributedContext`, from host to host, with the run's timeout."""
    groups = {"init_process_group", "destroy_process_group"}
    allowed = {"context.py": None, "loading.py": {"send", "recv", "get_rank"}, "pretended.py": groups}
    asking = {"get_rank", "get_world_size", "new_group"}
    package = Path(__file__).parents[2] / "ssmlora_dist"
    for file in package.rglob("*.py"):
        used = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "dist"
        }
        permitted = allowed.get(file.name, asking)
        assert permitted is None or used <= permitted, f"{file}: {used}"
