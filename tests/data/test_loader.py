"""The order of examples over steps, epochs, ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from ssmlora_dist.data import (
    BatchShape,
    Dataset,
    DatasetReport,
    Example,
    GlobalBatches,
    evaluation_batches,
)

PAD = 0


def dataset(num_examples, lengths=None):
    """Examples whose first token is their index + 1."""
    lengths = lengths or [3] * num_examples
    examples = [Example.from_tokens([i + 1] * n, [False] + [True] * (n - 1)) for i, n in enumerate(lengths)]
    return Dataset(examples, DatasetReport(num_examples, num_examples))


def batches(data, size=12, micro=1, rank=0, ranks=1, seed=0):
    return GlobalBatches(data, BatchShape(size, micro, rank, ranks, PAD), seed)


def shown(micro_batches):
    return [index - 1 for batch in micro_batches for index in batch.inputs["input_ids"][:, 0].tolist()]


@pytest.mark.parametrize("num_examples", [5, 12, 17, 100])
def test_every_epoch_shows_every_example_once(num_examples):
    loader = batches(dataset(num_examples), size=4)
    num_steps = loader.num_steps(4)
    row = [index for step in range(num_steps) for index in shown(loader.micro_batches(step))]
    epochs = [row[k * num_examples : (k + 1) * num_examples] for k in range(4)]
    assert all(sorted(epoch) == list(range(num_examples)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 12), (2, 3), (4, 1), (4, 3)])
def test_the_same_global_batches_on_any_topology(ranks, micro):
    data = dataset(17)
    for step in (0, 1, 5):
        expected = [index for (index,) in batches(data).indices(step)]
        per_rank = [batches(data, 12, micro, rank, ranks).micro_batches(step) for rank in range(ranks)]
        assert [index for share in per_rank for index in shown(share)] == expected
        assert all(len(share) == 12 // ranks // micro for share in per_rank)
        assert all(batch.shape[0] == micro for share in per_rank for batch in share)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 12), (2, 3), (4, 1), (4, 3)])
@pytest.mark.parametrize("row_tokens", [None, 7])
def test_an_example_has_the_same_dropout_seeds_on_any_topology(ranks, micro, row_tokens):
    data = dataset(17)

    def seeds(step, micro, rank, ranks):
        shape = BatchShape(12, micro, rank, ranks, PAD, dropout_seed=0)
        loader = GlobalBatches(data, shape, 0, row_tokens)
        found = [batch.inputs["dropout_seeds"] for batch in loader.micro_batches(step)]
        return [row[:3].tolist() for batch in found for row in batch]

    for step in (0, 1):
        shares = [seeds(step, micro, rank, ranks) for rank in range(ranks)]
        assert [row for share in shares for row in share] == seeds(step, 12, 0, 1)


def test_dropout_seeds_depend_on_seed_step_and_example_and_are_frozen():
    """Written down so that a change of library or code that would break resuming is seen."""
    shape = BatchShape(4, 4, 0, 1, PAD, dropout_seed=0)
    frozen = [-5208354772856091714, -892417645563214505, -5525438022468806686, 8283279666186566265]
    assert shape.dropout_seeds([1] * 4, 3) == [[seed] for seed in frozen]
    assert shape.dropout_seeds([2, 1, 1, 0], 3) == [frozen[:2], [frozen[2]], [frozen[3]], []]
    other = replace(shape, dropout_seed=1).dropout_seeds([4], 3) + shape.dropout_seeds([4], 4)
    assert len({*frozen, *(seed for row in other for seed in row)}) == 12


def test_any_step_can_come_first():
    data = dataset(17)
    straight = batches(data)
    in_order = [straight.indices(step) for step in range(8)]
    assert [batches(data).indices(step) for step in range(8)] == in_order
    assert [straight.indices(step) for step in reversed(range(8))] == in_order[::-1]


def test_a_global_batch_may_hold_more_than_an_epoch():
    counts = Counter(index for (index,) in batches(dataset(5), size=12).indices(0))
    assert sorted(counts.values()) == [2, 2, 2, 3, 3]


def test_order_depends_on_the_seed_and_is_frozen():
    """Written down so that a change of library or code that would break resuming is seen."""
    in_order = [index for (index,) in batches(dataset(8), size=8, seed=0).indices(0)]
    assert in_order == [6, 3, 5, 0, 7, 2, 1, 4]
    assert batches(dataset(8), size=8, seed=1).indices(0) != batches(dataset(8), size=8, seed=0).indices(0)


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(1, 3), (2, 5), (0.5, 2), (0.01, 1), (1.2, 3)])
def test_num_steps(num_epochs, num_steps):
    assert batches(dataset(10), size=4).num_steps(num_epochs) == num_steps


def test_sizes_must_divide():
    with pytest.raises(ValueError, match="global batch 12 is no multiple of micro-batch 4 x 2"):
        batches(dataset(3), 12, 4, 0, 2)


@pytest.mark.parametrize(
    ("num_examples", "ranks", "micro"), [(7, 1, 2), (7, 2, 2), (5, 4, 1), (3, 4, 2), (8, 2, 2)]
)
def test_evaluation_shows_each_example_once(num_examples, ranks, micro):
    data = dataset(num_examples, lengths=[2 + (5 * i) % 7 for i in range(num_examples)])
    shares = [
        list(evaluation_batches(data, BatchShape(micro * ranks, micro, rank, ranks, PAD)))
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = []
    for batch in (batch for share in shares for batch in share):
        assert len(batch.indices) == batch.batch.shape[0] == micro
        rows = batch.batch.places // batch.batch.shape[1]
        for row, index in enumerate(batch.indices):
            num_targets = int((rows == row).sum())
            if index is None:
                assert num_targets == 0
            else:
                seen.append(index)
                assert num_targets == data[index].num_targets
                assert batch.batch.inputs["input_ids"][row, 0] == index + 1
    assert sorted(seen) == list(range(num_examples))


def test_evaluation_begins_with_the_longest():
    data = dataset(6, lengths=[2, 9, 4, 5, 9, 7])
    widths = [batch.batch.shape[1] for batch in evaluation_batches(data, BatchShape(2, 2, 0, 1, PAD))]
    assert widths == [9, 7, 4]
