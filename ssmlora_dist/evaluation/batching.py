"""Batches of items within a token budget, and their tensors. B rows, S tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Size(NamedTuple):
    """Tokens of an item: of its prompt, and at most behind it."""

    prompt: int
    answer: int


class Prompts(NamedTuple):
    """A batch of left-padded prompts, each [B,S] int64; `attention_mask` is 0 where there is padding."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def plan_batches(sizes: Sequence[Size], max_tokens: int) -> list[list[int]]:
    """Indices of `sizes` in batches, the longest first: a function of its arguments alone.

    Args:
        sizes: of the items.
        max_tokens: rows of a batch times its longest prompt and its longest answer, padding included, stay
            within this; an item that alone is larger has a batch of its own.
    """
    batches: list[list[int]] = []
    longest = Size(0, 0)
    for index in sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), -sizes[i].prompt, i)):
        size = sizes[index]
        widened = Size(max(longest.prompt, size.prompt), max(longest.answer, size.answer))
        if batches and (len(batches[-1]) + 1) * sum(widened) <= max_tokens:
            batches[-1].append(index)
            longest = widened
        else:
            batches.append([index])
            longest = size
    return batches


def padded_tokens(sizes: Sequence[Size]) -> int:
    """Tokens of one batch of items of these sizes, padding included."""
    return len(sizes) * (max(size.prompt for size in sizes) + max(size.answer for size in sizes))


def deal_out(costs: Sequence[int], loads: Sequence[int]) -> list[list[int]]:
    """Indices of `costs` for each rank, in ascending order: a function of its arguments alone.

    The dearest first, each goes to the rank that has the least to do by then, the lowest of equals. No rank
    has more than another by more than the dearest cost, unless `loads` did.

    Args:
        costs: of what is dealt out.
        loads: what each rank has to do already, in the same unit.
    """
    totals = list(loads)
    shares: list[list[int]] = [[] for _ in totals]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = totals.index(min(totals))
        totals[rank] += costs[index]
        shares[rank].append(index)
    return [sorted(share) for share in shares]


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> Prompts:
    """Prompts with padding before them, so that each ends where its answer begins."""
    width = max(map(len, prompts))
    # Any token will do as padding: it is masked.
    input_ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return Prompts(input_ids.to(device), mask.to(device), positions.to(device))


def right_padded(rows: Iterable[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B,S] of rows with padding behind them; a row may be empty."""
    rows = list(rows)
    width = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return input_ids.to(device), mask.to(device)
