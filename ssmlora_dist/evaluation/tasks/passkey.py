"""A pass key hidden in a text that says nothing (Mohtashami and Jaggi, arXiv 2305.16300)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.haystack import Puzzle, background, hidden_fact_items, noise
from ssmlora_dist.evaluation.tasks.lengths import Sampling, TokenCounter
from ssmlora_dist.evaluation.tasks.names import draw_number, draw_owned

NUM_DIGITS = 5
MAX_NEW_TOKENS = 16

OPENING = (
    "A pass key is hidden in the text below. Find it and remember it: it is asked for at the end.\nText:"
)
FACT = "The pass key is {value}. Keep it in mind."
QUESTION = "\nQuestion: What is the pass key?\nAnswer: The pass key is"


def passkey(
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_examples: int,
    split: str,
    seed: int,
    text: str | None = None,
) -> Iterator[GenerationItem]:
    """Generates items that ask for a number of five digits.

    The original hides the key in the same way, between sentences that are repeated; it says the key twice,
    the wording here is our own and says it once.

    Args:
        tokenizer: of the model.
        lengths: tokens of the prompt and of the answer's budget together. Prompts are within one word of
            the haystack of it, and never above.
        depths: shares of the haystack before the key, from 0 to 1; examples of each length cycle over them.
        num_examples: of each length.
        split: `train`, `validation` or `test`; they have no key in common.
        seed: of keys and passages.
        text: hides the key, instead of one line repeated.

    Returns:
        Items of which number i, whatever the number of examples, is always the same. The answer is right
        where it contains the one reference.

    Raises:
        DataError: a length is too short, the text is empty.
    """
    sampling = Sampling("passkey", tuple(lengths), num_examples, split, seed)
    counter = TokenCounter(tokenizer)
    puzzles = []
    for number in range(num_examples):
        draw = functools.partial(draw_number, num_digits=NUM_DIGITS)
        (value,) = draw_owned(draw, 1, split, sampling.random(number))
        depth = depths[number % len(depths)]
        fact = FACT.format(value=value)
        puzzles.append(Puzzle(OPENING, (fact,), QUESTION, (value,), f" {value}", depth))
    haystack = noise(counter) if text is None else background(counter, text)
    return hidden_fact_items(counter, sampling, haystack, puzzles, MAX_NEW_TOKENS)
