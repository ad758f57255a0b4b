"""Greedy answers to a batch of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ssmlora_dist.evaluation.batching import left_padded
from ssmlora_dist.tokenization import end_token_ids


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in token ids, never empty, and where its answer ends at the latest.

    Args:
        prompt: its ids.
        max_new_tokens: of the answer, at least 1.
        stop: texts before which the answer ends.
    """

    prompt: list[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@torch.no_grad()
def generate(model: Any, tokenizer: Any, items: Sequence[EncodedPrompt]) -> list[str | None]:
    """What the model answers to each prompt: the likeliest token, again and again.

    A row ends with an end-of-sequence token, a stop text or its number of tokens, the batch with its last
    row. The model's generation configuration adds such tokens and texts; its penalties and temperatures do
    not apply.

    Args:
        model: a causal language model of transformers in evaluation mode.
        tokenizer: its tokenizer.
        items: one batch.

    Returns:
        Texts without special tokens, cut before the first stop text; None where a logit was not a number.
    """
    configured = model.generation_config
    ends = end_token_ids(tokenizer.eos_token_id, configured.eos_token_id)
    stop_texts = configured.stop_strings or ()
    if isinstance(stop_texts, str):
        stop_texts = [stop_texts]
    items = [replace(item, stop=(*item.stop, *stop_texts)) for item in items]
    input_ids, mask, position_ids = left_padded([item.prompt for item in items], model.device)
    lengths = mask.sum(1, keepdim=True)
    cache = None
    answers: list[list[int]] = [[] for _ in items]
    texts: list[str | None] = [None] * len(items)
    running = set(range(len(items)))
    for step in range(max(item.max_new_tokens for item in items)):
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        largest, input_ids = output.logits[:, -1].max(-1, keepdim=True)
        tokens, numbers = input_ids[:, 0].tolist(), (~largest[:, 0].isnan()).tolist()
        for row in sorted(running):
            if numbers[row]:
                texts[row] = _finished(tokenizer, items[row], answers[row], tokens[row], ends)
            if texts[row] is not None or not numbers[row]:
                running.remove(row)
        if not running:
            break
        mask = torch.cat([mask, mask.new_ones(len(items), 1)], 1)
        position_ids = lengths + step
    return texts


def _finished(
    tokenizer: Any, item: EncodedPrompt, answer: list[int], token: int, ends: Sequence[int]
) -> str | None:
    """Adds `token` to `answer`; its text if that ends it."""
    done = token in ends
    if not done:
        answer.append(token)
        done = len(answer) == item.max_new_tokens
    if not done and not item.stop:
        return None
    text = str(tokenizer.decode(answer, skip_special_tokens=True))
    stops = [position for position in map(text.find, item.stop) if position >= 0]
    if stops:
        return text[: min(stops)]
    return text if done else None
