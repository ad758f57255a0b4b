"""Examples to one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmlora_dist.batches import IGNORED_LABEL, Batch
from ssmlora_dist.data.examples import Example
from ssmlora_dist.ops.dropout import token_seeds

Row = Sequence[Example]
"""The samples that share a row of a batch: one, or several that are packed."""


def collate(
    rows: Sequence[Row],
    pad_token_id: int,
    seeds: Sequence[Sequence[int]] | None = None,
    *,
    is_scored: bool = False,
    multiple: int = 1,
) -> Batch:
    """Stacks rows, padded on the right to the longest.

    Args:
        rows: at least one, B, of at least one example each.
        pad_token_id: what fills `input_ids`; no sample sees it and the loss never counts it.
        seeds: of the dropout, an int64 for each example; None: nothing is dropped.
        multiple: of which the number of tokens is to be one.
        is_scored: whether scores are asked for; of each example `num_scored` target tokens count.

    Returns:
        A batch on the CPU.
    """
    longest = max(sum(example.num_tokens for example in row) for row in rows)
    num_tokens = -(-longest // multiple) * multiple
    shape = (len(rows), num_tokens)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
    position_ids = torch.arange(num_tokens).repeat(len(rows), 1)
    dropout_seeds = torch.zeros(shape, dtype=torch.int32)
    scored = torch.zeros(shape, dtype=torch.bool)
    num_padding = 0
    for index, row in enumerate(rows):
        begin = 0
        for number, example in enumerate(row):
            end = begin + example.num_tokens
            input_ids[index, begin:end] = torch.from_numpy(example.input_ids)
            labels[index, begin:end] = torch.from_numpy(example.labels)
            # What pads the row goes on from its last sample.
            position_ids[index, begin:] = torch.arange(num_tokens - begin)
            scored[index, begin:end] = torch.from_numpy(example.scored_tokens)
            if seeds is not None:
                dropout_seeds[index, begin:end] = token_seeds(seeds[index][number], example.num_tokens)
            begin = end
        num_padding += num_tokens - begin
    is_packed = any(len(row) > 1 for row in rows)
    return Batch.of(
        labels,
        lengths=tuple(tuple(example.num_tokens for example in row) for row in rows) if is_packed else None,
        num_padding=num_padding,
        scored=scored if is_scored else None,
        input_ids=input_ids,
        position_ids=position_ids,
        **({} if seeds is None else {"dropout_seeds": dropout_seeds}),
    )
