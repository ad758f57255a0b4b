"""Frequent words of RULER (arXiv 2404.06654): which made-up words of a long text occur most often."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.lengths import Sampling, TokenCounter, fit
from ssmlora_dist.evaluation.tasks.names import draw_letters, draw_owned

MAX_NEW_TOKENS = 50
NUM_ASKED = 3
NUM_LETTERS = 6
TOKENS_PER_WORD = 50

DOTS = "..."
# So often are dots there at least: the last of the words asked for, of rank 4, then occurs once.
LEAST_DOTS = (NUM_ASKED + 1) ** 2

OPENING = "The text below is made of code words, some of which occur more often than others.\nText:"
QUESTION = (
    "\nQuestion: Leaving out the dots, which three words occur most often in the text?"
    "\nAnswer: The three most frequent words of the text are:"
)


def frequent_words(
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    num_examples: int,
    split: str,
    seed: int,
) -> Iterator[GenerationItem]:
    """Generates items that ask for the three most frequent of made-up words.

    Words of six letters, their frequencies (zeta distributed: as the rank to the power of -2), dots in the
    first rank that are to be left out, a word of vocabulary for every 50 tokens and the answer's budget are
    RULER's. Other than there: the wording is our own, no other word occurs as often as the three, and what
    is left at the end is filled with dots.

    Args:
        tokenizer: of the model.
        lengths: tokens of the prompt and of the answer's budget together. Prompts are within the
            tokens of three dots of it, and never above.
        num_examples: of each length.
        split: `train`, `validation` or `test`; they have no word in common.
        seed: of words and of their order.

    Returns:
        Items of which number i, whatever the number of examples, is always the same. The references are the
        three words; RULER's score is the share of them that the answer contains.

    Raises:
        DataError: a length is too short.
    """
    sampling = Sampling("frequent_words", tuple(lengths), num_examples, split, seed)
    counter = TokenCounter(tokenizer)
    frame = counter.count(OPENING + QUESTION)
    (dots_cost,) = counter.costs([f" {DOTS}"]).tolist()
    asked = [
        f" {word}" for number in range(num_examples) for word in _draw_words(NUM_ASKED, sampling, number)
    ]
    asked_costs = counter.costs(asked).reshape(num_examples, NUM_ASKED)
    dots, *seldom = _occurrences(LEAST_DOTS, NUM_ASKED + 1).tolist()
    least = frame + dots * dots_cost + int((asked_costs @ seldom).max()) + MAX_NEW_TOKENS
    sampling.require(least, "the three words and as many dots as go with them")

    def build(words: Sequence[str], key: tuple[object, ...], target: int) -> str:
        costs = np.asarray([dots_cost, *counter.costs([f" {word}" for word in words]).tolist()])
        room = target - frame
        # The first number of dots that is too many, in a sorted row of them.
        dots = bisect.bisect_right(
            range(room // dots_cost + 1), room, key=lambda dots: int(_occurrences(dots, len(costs)) @ costs)
        )
        occurrences = _occurrences(max(dots - 1, LEAST_DOTS), len(costs))
        occurrences[0] += max(room - int(occurrences @ costs), 0) // dots_cost
        text = [
            f" {word}"
            for word, count in zip([DOTS, *words], occurrences.tolist(), strict=True)
            for _ in range(count)
        ]
        sampling.random(*key).shuffle(text)
        return OPENING + "".join(text) + QUESTION

    def items() -> Iterator[GenerationItem]:
        for number, length in sampling.examples():
            # A word of rank k occurs from k squared words on.
            num_words = min(max(length - MAX_NEW_TOKENS, 0) // TOKENS_PER_WORD - 1, math.isqrt(length))
            words = _draw_words(max(num_words, NUM_ASKED), sampling, number)
            key = (number, length)
            yield GenerationItem(
                id=f"{length}/{number}",
                prompt=fit(counter, length - MAX_NEW_TOKENS, 0, functools.partial(build, words, key)),
                references=tuple(words[:NUM_ASKED]),
                max_new_tokens=MAX_NEW_TOKENS,
                metadata={"length": length},
                answer=" " + " ".join(words[:NUM_ASKED]),
            )

    return items()


def _draw_words(num_words: int, sampling: Sampling, number: int) -> list[str]:
    """The first words of an example's vocabulary."""
    draw = functools.partial(draw_letters, num_letters=NUM_LETTERS)
    return draw_owned(draw, num_words, sampling.split, sampling.random(number))


def _occurrences(dots: int, num_ranks: int) -> NDArray[np.int64]:
    """How often the words of all ranks occur where the first does so often."""
    occurrences = dots // np.arange(1, num_ranks + 1, dtype=np.int64) ** 2
    # Rounded, the fifth can come as often as the fourth.
    others = occurrences[NUM_ASKED + 1 :]
    np.minimum(others, max(int(occurrences[NUM_ASKED]) - 1, 0), out=others)
    return occurrences
