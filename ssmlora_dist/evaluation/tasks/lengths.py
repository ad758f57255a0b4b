"""Prompts of an exact length in a model's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlora_dist.errors import DataError
from ssmlora_dist.prose import SPLITS
from ssmlora_dist.tokenization import TextEncoder

# What a piece of text is put behind to see what it costs where it goes on: mostly a sentence ends there.
ANCHOR = "."
# A prompt within this share of its length is not made again to gain a token.
CLOSE_ENOUGH = 0.005
MAX_ATTEMPTS = 8


class TokenCounter:
    """Counts tokens.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._encoder = TextEncoder(tokenizer)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt as a model gets it."""
        return len(self._encoder.begin(prompt))

    def costs(self, pieces: Sequence[str]) -> NDArray[np.int64]:
        """Tokens that every piece adds where a text goes on with it; nearly so where tokens merge."""
        anchor = len(self._encoder.encode(ANCHOR))
        counts = [len(self._encoder.encode(ANCHOR + piece)) for piece in pieces]
        return np.maximum(np.asarray(counts, dtype=np.int64) - anchor, 0)


@dataclass(frozen=True)
class Sampling:
    """Which examples a task has.

    Args:
        task: its name, for errors and seeds.
        lengths: tokens of the prompt and of the answer's budget together.
        num_examples: of each length.
        split: `train`, `validation` or `test`.
        seed: of everything that is drawn.

    Raises:
        DataError: there is no such split, a length is named twice, or nothing is asked for.
    """

    task: str
    lengths: tuple[int, ...]
    num_examples: int
    split: str
    seed: int

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"{self.task}: split {self.split!r} is none of {', '.join(SPLITS)}")
        if not self.lengths or len(set(self.lengths)) < len(self.lengths):
            raise DataError(f"{self.task}: lengths {list(self.lengths)}: name one or more, each once")
        if self.num_examples < 1:
            raise DataError(f"{self.task}: num_examples {self.num_examples}: ask for one or more")

    def random(self, *key: object) -> Random:
        """Random numbers of their own for one thing of one example."""
        return Random("/".join(map(str, (self.seed, self.task, self.split, *key))))

    def examples(self) -> Iterator[tuple[int, int]]:
        """Number and length of every example: all lengths of the first, then of the second."""
        return ((k, length) for k in range(self.num_examples) for length in self.lengths)

    def require(self, least: int, what: str, length: int | None = None) -> None:
        """Raises if a length, by default the shortest, is less than the least that holds every example."""
        length = min(self.lengths) if length is None else length
        if length < least:
            raise DataError(
                f"{self.task}: a length of {length} tokens cannot hold {what} with this tokenizer; use at "
                f"least {least}"
            )


def fit(counter: TokenCounter, budget: int, base: int, build: Callable[[int], str]) -> str:
    """Makes a prompt of at most so many tokens, and of hardly fewer.

    Filler is counted piece by piece, and pieces may merge into other tokens where they meet. So the prompt
    is encoded as it is and, where it came out too long or too short, made again with less or more filler.

    Args:
        counter: of tokens.
        budget: the most tokens.
        base: tokens of the prompt without filler.
        build: of the tokens of filler, makes a prompt; the same one for the same number.

    Raises:
        DataError: no attempt was within the budget.
    """
    best, best_count = "", -1
    room, tried = max(budget - base, 0), set[int]()
    while room not in tried and len(tried) < MAX_ATTEMPTS:
        tried.add(room)
        prompt = build(room)
        count = counter.count(prompt)
        if count <= budget:
            if count <= best_count:
                break
            best, best_count = prompt, count
            if budget - count <= CLOSE_ENOUGH * budget:
                break
        room = max(room + budget - count, 0)
    if best_count < 0:
        raise DataError(f"no prompt of at most {budget} tokens could be made; use a greater length")
    return best
