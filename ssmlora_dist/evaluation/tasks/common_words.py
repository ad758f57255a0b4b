"""Common words of RULER (arXiv 2404.06654): which words of a long numbered list are repeated most often."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from ssmlora_dist import prose
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.lengths import Sampling, TokenCounter, fit
from ssmlora_dist.evaluation.tasks.names import owned_pairs

MAX_NEW_TOKENS = 120
NUM_COMMON = 10
BREAK = "\n\n"
# From this length on words are repeated more often.
LONG = 4096

OPENING = "In the numbered list below some words occur more often than others.\nList:"
QUESTION = (
    f"\nQuestion: Which {NUM_COMMON} words occur most often in the list?"
    f"\nAnswer: The {NUM_COMMON} most frequent words of the list are:"
)


@dataclass(frozen=True)
class Repeats:
    """How often each word occurs, in the list that is asked about and in the solved one."""

    common: int
    uncommon: int
    solved_common: int
    solved_uncommon: int
    num_solved_uncommon: int


@dataclass(frozen=True)
class Drawn:
    """The common words of one list, and the solved lists before it with their words in order of frequency."""

    common: tuple[str, ...]
    solved: tuple[tuple[str, ...], ...]


def common_words(
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    num_examples: int,
    split: str,
    seed: int,
    num_fewshot: int = 1,
) -> Iterator[GenerationItem]:
    """Generates items that ask for the ten words of a numbered list that are repeated most often.

    Numbers of words and repeats, the solved example before the task and the answer's budget are RULER's: from
    4,096 tokens on the common words occur 30 times and the others 3 times, below 6 times and once. Other than
    there: the wording and the words are our own, and none of the ten is part of another word. Where a split
    has too few words for a long list, all of the list is pairs of words such as `quiet-harbor`.

    Args:
        tokenizer: of the model.
        lengths: tokens of the prompt and of the answer's budget together. Prompts are within one word, in all
            its repeats, of it, and never above.
        num_examples: of each length.
        split: `train`, `validation` or `test`; they have no word in common.
        seed: of words and of their order.
        num_fewshot: solved examples before the task.

    Returns:
        Items of which number i, whatever the number of examples, is always the same. The references are the
        ten words; RULER's score is the share of them that the answer contains.

    Raises:
        DataError: a length is too short, or so long that the split has too few words.
    """
    sampling = Sampling("common_words", tuple(lengths), num_examples, split, seed)
    counter = TokenCounter(tokenizer)
    singles = tuple(word for word in prose.words() if prose.split_of(word) == split)
    supplies = [NumberedLists(counter, words, max(lengths)) for words in (singles, owned_pairs(split))]
    chosen = {
        length: next((lists for lists in supplies if lists.suffice(length)), supplies[-1])
        for length in lengths
    }
    drawn = {
        (number, length): chosen[length].draw(length, num_fewshot, sampling.random(number))
        for number, length in sampling.examples()
    }
    for length, lists in chosen.items():
        if not lists.suffice(length):
            raise DataError(
                f"common_words: the {split} split has too few words for a length of {length} tokens; use "
                "shorter ones"
            )
        least = max(lists.least(length, drawn[number, length]) for number in range(num_examples))
        sampling.require(least, f"a list and {num_fewshot} solved before it", length)

    def items() -> Iterator[GenerationItem]:
        for (number, length), words in drawn.items():
            key = (number, length)
            build = functools.partial(chosen[length].prompt, length, words, sampling, key)
            prompt = fit(counter, length - MAX_NEW_TOKENS, 0, build)
            yield GenerationItem(
                id=f"{length}/{number}",
                prompt=prompt,
                references=words.common,
                max_new_tokens=MAX_NEW_TOKENS,
                metadata={"length": length},
                answer=_numbered(words.common),
            )

    return items()


class NumberedLists:
    """Makes numbered lists of words, and knows what they cost.

    Args:
        counter: of tokens.
        words: the supply.
        max_length: of a list, in tokens.
    """

    def __init__(self, counter: TokenCounter, words: Sequence[str], max_length: int) -> None:
        self._words = list(words)
        costs = counter.costs([f" {word}" for word in words]).tolist()
        self._costs = dict(zip(words, costs, strict=True))
        # Number, dot and word are three tokens, or two at the very least.
        numbers = counter.costs([f" {number + 1}." for number in range(max_length // 2)])
        self._numbers = np.cumsum([0, *numbers.tolist()])
        self._frame = counter.count(OPENING + QUESTION)
        (self._break,) = counter.costs([BREAK]).tolist()

    def suffice(self, length: int) -> bool:
        """Whether the words fill a list of so many tokens. A tenth of them is kept back for choices."""
        num_entries = int(0.9 * len(self._words)) * repeats_of(length).uncommon
        if num_entries >= len(self._numbers):
            return True
        per_word = sum(self._costs.values()) / max(len(self._words), 1)
        return bool(self._numbers[num_entries] + num_entries * per_word >= length)

    def draw(self, length: int, num_fewshot: int, rng: Random) -> Drawn:
        """Words of which none of the common ones is part of another."""
        repeats = repeats_of(length)
        num_solved = NUM_COMMON + repeats.num_solved_uncommon
        names = rng.sample(self._words, min(4 * NUM_COMMON + num_fewshot * num_solved, len(self._words)))
        common: list[str] = []
        for name in names:
            if len(common) < NUM_COMMON and not any(name in word or word in name for word in common):
                common.append(name)
        rest = [name for name in names if name not in common]
        solved = [tuple(rest[k * num_solved : (k + 1) * num_solved]) for k in range(num_fewshot)]
        return Drawn(tuple(common), tuple(solved))

    def least(self, length: int, drawn: Drawn) -> int:
        """Tokens that one uncommon word needs beside the common ones, the answer's budget included."""
        repeats = repeats_of(length)
        dearest = max(self._costs.values())
        entries = self._entries_cost(
            NUM_COMMON * repeats.common + repeats.uncommon,
            repeats.common * sum(self._costs[word] for word in drawn.common) + repeats.uncommon * dearest,
        )
        return self._frame + self._solved_cost(repeats, drawn) + entries + MAX_NEW_TOKENS

    def prompt(
        self, length: int, drawn: Drawn, sampling: Sampling, key: tuple[object, ...], target: int
    ) -> str:
        """A prompt of nearly so many tokens.

        Args:
            length: decides how often words are repeated.
            drawn: the words.
            sampling: of the uncommon words and of the order.
            key: of its random numbers.
            target: tokens.
        """
        repeats, rng = repeats_of(length), sampling.random(*key)
        room = target - self._frame - self._solved_cost(repeats, drawn)
        uncommon = self._choose_uncommon(repeats, drawn, room, rng)
        solved = []
        for words in drawn.solved:
            entries = words[:NUM_COMMON] * repeats.solved_common
            entries += words[NUM_COMMON:] * repeats.solved_uncommon
            solved.append(_question(entries, rng) + _numbered(words[:NUM_COMMON]) + BREAK)
        entries = drawn.common * repeats.common + tuple(uncommon) * repeats.uncommon
        return "".join(solved) + _question(entries, rng)

    def _choose_uncommon(self, repeats: Repeats, drawn: Drawn, room: int, rng: Random) -> list[str]:
        """As many words as fit, the last of them such that it fits best."""
        common_cost = repeats.common * sum(self._costs[word] for word in drawn.common)
        num_common = NUM_COMMON * repeats.common
        taken = {*drawn.common, *(word for words in drawn.solved for word in words)}
        wanted = max(room, 0) // (2 * repeats.uncommon) + NUM_COMMON
        supply = [
            word
            for word in rng.sample(self._words, min(wanted + len(taken), len(self._words)))
            if word not in taken and not any(common in word for common in drawn.common)
        ]
        costs = np.asarray([self._costs[word] for word in supply], dtype=np.int64)
        counts = num_common + repeats.uncommon * np.arange(1, len(supply) + 1)
        fitting = counts < len(self._numbers)
        totals = self._numbers[counts[fitting]] + common_cost + repeats.uncommon * np.cumsum(costs)[fitting]
        num_words = int(np.searchsorted(totals, room, "right"))
        if num_words == 0:
            return []
        spare = (room - int(totals[num_words - 1])) // repeats.uncommon + costs[num_words - 1]
        last = costs[num_words - 1 :]
        best = num_words - 1 + int(np.argmax(np.where(last <= spare, last, -1)))
        return [*supply[: num_words - 1], supply[best]]

    def _solved_cost(self, repeats: Repeats, drawn: Drawn) -> int:
        """Tokens of the solved lists."""
        total = 0
        for words in drawn.solved:
            common, uncommon = words[:NUM_COMMON], words[NUM_COMMON:]
            common_cost = sum(self._costs[word] for word in common)
            uncommon_cost = sum(self._costs[word] for word in uncommon)
            total += self._frame + self._entries_cost(
                len(common) * repeats.solved_common + len(uncommon) * repeats.solved_uncommon,
                common_cost * (repeats.solved_common + 1) + uncommon_cost * repeats.solved_uncommon,
            )
            total += int(self._numbers[len(common)]) + self._break
        return total

    def _entries_cost(self, num_entries: int, words_cost: int) -> int:
        """Tokens of numbered words."""
        last = len(self._numbers) - 1
        # Numbers beyond the longest list cost at least as much as its last.
        beyond = max(num_entries - last, 0) * int(self._numbers[last] - self._numbers[last - 1])
        return int(self._numbers[min(num_entries, last)]) + beyond + words_cost


def repeats_of(length: int) -> Repeats:
    """How often words are repeated in prompts of a length."""
    return Repeats(30, 3, 10, 3, 30) if length >= LONG else Repeats(6, 1, 3, 1, 10)


def _question(entries: Sequence[str], rng: Random) -> str:
    return OPENING + _numbered(rng.sample(entries, len(entries))) + QUESTION


def _numbered(words: Sequence[str]) -> str:
    return "".join(f" {number}. {word}" for number, word in enumerate(words, 1))
