"""Batches of rows that are padded and packed."""

from __future__ import annotations

import torch

from ssmlora_dist.data import Example, collate
from ssmlora_dist.ops.dropout import token_seeds

LONG = Example.from_tokens([5, 6, 7], [False, True, True], num_scored=1)
SHORT = Example.from_tokens([8, 9], [True, True])
PAD = 3


def test_pads_on_the_right():
    batch = collate([[LONG], [SHORT]], PAD)
    assert {name: tensor.tolist() for name, tensor in batch.inputs.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 3]],
        "position_ids": [[0, 1, 2], [0, 1, 2]],
    }
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.places.tolist() == [0, 1, 3]
    assert (batch.columns.tolist(), batch.column_places.tolist()) == ([0, 1], [0, 1, 2])
    assert (batch.num_tokens, batch.num_targets, batch.num_padding) == (6, 3, 1)
    assert batch.lengths is None
    assert batch.scored is None
    tensors = (*batch.inputs.values(), batch.targets, batch.places)
    assert all(tensor.dtype == torch.int64 for tensor in tensors)


def test_samples_of_a_row_begin_at_position_0_and_none_predicts_the_next():
    batch = collate([[LONG, SHORT], [SHORT]], PAD, is_scored=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 3, 3, 3]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch.targets.tolist() == [6, 7, 9, 9]
    assert batch.places.tolist() == [0, 1, 3, 5]
    assert batch.lengths == ((3, 2), (2,))
    assert batch.num_padding == 3
    assert batch.scored.tolist() == [True, False, True, True]


def test_a_sample_is_given_its_own_dropout_seeds_wherever_it_lies():
    packed = collate([[LONG, SHORT]], PAD, [[11, 12]]).inputs["dropout_seeds"]
    assert packed.tolist() == [token_seeds(11, 3).tolist() + token_seeds(12, 2).tolist()]
    assert collate([[SHORT]], PAD, [[12]]).inputs["dropout_seeds"].tolist() == [token_seeds(12, 2).tolist()]
