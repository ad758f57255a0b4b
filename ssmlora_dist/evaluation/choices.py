"""Log-likelihoods of the choices of many items, each item's prompt computed once.

Shapes: B items, P prompt tokens, N tokens of a choice, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmlora_dist.evaluation.batching import left_padded, right_padded
from ssmlora_dist.evaluation.encoding import EncodedChoices


@torch.no_grad()
def choice_log_likelihoods(model: Any, items: Sequence[EncodedChoices]) -> list[tuple[float, ...]]:
    """Log-likelihoods of every item's choices given its prompt, in nats, summed over tokens.

    The prompts run once, as one batch; their last logits say all about choices of one token. Longer choices
    run on the prompts' key-value cache, one choice of every item at a time, and the cache is cut back behind
    each: it is never repeated, however many choices there are. The adapter's state needs no cache, since it
    runs along depth only.

    Args:
        model: a causal language model of transformers in evaluation mode; the softmax is in float32.
        items: one batch.
    """
    prompts = left_padded([item.prompt for item in items], model.device)
    longer = any(item.num_extra for item in items)
    output = model(**prompts._asdict(), use_cache=longer, logits_to_keep=1)
    first_ids, _ = right_padded([[ids[0] for ids in item.choices] for item in items], model.device)
    first = _log_softmax(output.logits[:, -1]).gather(-1, first_ids).tolist()
    sums = [row[: len(item.choices)] for row, item in zip(first, items, strict=True)]
    if longer:
        cache = output.past_key_values
        # Lets the layers of a sliding window be cut back too: they keep what a choice pushes out of it.
        cache.activate_past_recording()
        lengths = torch.tensor([len(item.prompt) for item in items], device=model.device)
        # The longest choices of all items together, then the second longest: the least padding.
        orders = [sorted(range(len(item.choices)), key=lambda i: -len(item.choices[i])) for item in items]
        for rank in range(max(map(len, orders))):
            chosen = [order[rank] if rank < len(order) else None for order in orders]
            rows = [[] if i is None else item.choices[i] for i, item in zip(chosen, items, strict=True)]
            if max(map(len, rows)) < 2:
                break
            rest = _continued(model, rows, cache, prompts.attention_mask, lengths)
            for row, i in enumerate(chosen):
                if i is not None:
                    sums[row][i] += rest[row]
    return [tuple(row) for row in sums]


def _continued(
    model: Any, rows: Sequence[Sequence[int]], cache: Any, prompt_mask: Tensor, lengths: Tensor
) -> list[float]:
    """Log-likelihoods [B] of all but the first token of each row, on the prompts' cache, left as it was."""
    input_ids, mask = right_padded([row[:-1] for row in rows], model.device)
    num_tokens = input_ids.shape[1]
    output = model(
        input_ids=input_ids,
        attention_mask=torch.cat([prompt_mask, mask], 1),
        position_ids=lengths[:, None] + torch.arange(num_tokens, device=model.device),
        past_key_values=cache,
        use_cache=True,
    )
    cache.crop(-num_tokens)
    sums = []
    # A row at a time: float32 logits [B,N,V] can be larger than all else.
    for row, logits_NV in zip(rows, output.logits, strict=True):
        targets_N = torch.tensor(row[1:], device=logits_NV.device, dtype=torch.int64)
        found_N = _log_softmax(logits_NV[: len(targets_N)]).gather(-1, targets_N[:, None])
        sums.append(found_N.sum())
    return torch.stack(sums).tolist()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32)
