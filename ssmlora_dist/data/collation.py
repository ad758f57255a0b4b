"""Examples to one batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmlora_dist.data.examples import IGNORE_INDEX, Example


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """Stacks examples, padded on the right to the longest.

    Args:
        examples: at least one, B.
        pad_token_id: what fills `input_ids`; attention never sees it and the loss never counts it.

    Returns:
        `input_ids`, `attention_mask` (1 for tokens, 0 for padding), `position_ids` (0 to S - 1 in every row)
        and `labels` (`IGNORE_INDEX` where nothing is trained), each [B,S] int64 on the CPU.
    """
    num_tokens = max(example.num_tokens for example in examples)
    shape = (len(examples), num_tokens)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        input_ids[row, : example.num_tokens] = torch.from_numpy(example.input_ids)
        labels[row, : example.num_tokens] = torch.from_numpy(example.labels)
        attention_mask[row, : example.num_tokens] = 1
    position_ids = torch.arange(num_tokens).repeat(len(examples), 1)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "labels": labels,
    }
