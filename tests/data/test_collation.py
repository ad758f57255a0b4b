"""Batches of tensors."""

from __future__ import annotations

import torch

from ssmlora_dist.data import Example, collate


def test_pads_on_the_right():
    examples = [
        Example.from_tokens([5, 6, 7], [False, True, True]),
        Example.from_tokens([8, 9], [True, True]),
    ]
    batch = collate(examples, pad_token_id=3)
    expected = {
        "input_ids": [[5, 6, 7], [8, 9, 3]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "position_ids": [[0, 1, 2], [0, 1, 2]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
