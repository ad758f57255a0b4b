"""Facts hidden in a text that is cut to measure."""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal, Protocol

import numpy as np

from ssmlora_dist import prose
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.lengths import Sampling, TokenCounter, fit

NOISE = (
    "The rain falls on the hill. The road runs to the sea. A bird sings. Day comes, and then the night.",
)
"""Lines that say nothing, over and over."""

# In any script: what follows need not be a capital, but no small Latin letter.
SENTENCE_END = re.compile(r"(?<=[.!?:]) (?![a-z])|(?<=[。！？])")
# Pieces that a text is cut into: words; what has no spaces in it is cut all the same.
PIECE = re.compile(r"\s*\S{1,24}")
# Passages that are looked at for one that fills its place, before the fact and behind it, to the token.
NUM_CANDIDATES = 64


@dataclass(frozen=True)
class Puzzle:
    """What is hidden and asked in one example.

    Args:
        opening: what comes before the haystack.
        facts: what is hidden in it.
        question: what comes behind it.
        references: the answers.
        answer: them all, as they continue the question.
        depth: where the first fact lies, as the share of the haystack's other tokens before it; the other
            facts lie anywhere. None: all facts lie anywhere, in their order.
        metadata: more to say of the item.
    """

    opening: str
    facts: tuple[str, ...]
    question: str
    references: tuple[str, ...]
    answer: str
    depth: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Haystack(Protocol):
    """Hides facts.

    Attributes:
        separator: stands before every fact.
    """

    separator: str

    def hide(self, facts: Sequence[str], depth: float | None, room: int, rng: Random) -> str:
        """A text of the facts and of `room` other tokens; depths as of a `Puzzle`."""


def background(counter: TokenCounter, text: str | None = None) -> Background:
    """A haystack of prose.

    Args:
        counter: of tokens.
        text: the prose; its lines are joined. None: the language reference of the interpreter.

    Raises:
        DataError: the text is empty.
    """
    if text is None:
        return Background(counter, prose.sentences(), " ")
    sentences = SENTENCE_END.split(" ".join(text.split()))
    # A text without sentences can be parted at any word.
    return Background(counter, sentences if len(sentences) > 1 else text.split(), " ")


def noise(counter: TokenCounter) -> Background:
    """A haystack of one line that is repeated."""
    return Background(counter, NOISE, "\n")


class Background:
    """A haystack cut from a text that runs in a circle, at words; facts stand between its sentences.

    Args:
        counter: of tokens.
        sentences: the text.
        separator: stands before every sentence and every fact.

    Raises:
        DataError: the text is empty.
    """

    def __init__(self, counter: TokenCounter, sentences: Sequence[str], separator: str) -> None:
        pieces: list[str] = []
        starts: list[int] = []
        for sentence in sentences:
            words = PIECE.findall(separator + sentence)
            if words:
                starts.append(len(pieces))
                pieces.extend(words)
        if not pieces:
            raise DataError(
                "the background text is empty; give one with words in it, or none for the default"
            )
        unique = sorted(set(pieces))
        costs = dict(zip(unique, counter.costs(unique).tolist(), strict=True))
        self.separator = separator
        self._counter = counter
        self._num_pieces = len(pieces)
        self._text = "".join(pieces)
        self._offsets = list(itertools.accumulate(map(len, pieces), initial=0))
        self._costs = np.cumsum([0, *(costs[piece] for piece in pieces)])
        self._starts = starts

    def hide(self, facts: Sequence[str], depth: float | None, room: int, rng: Random) -> str:
        """As of a `Haystack`. A passage is chosen in which a sentence begins where the fact goes."""
        written = [self.separator + fact for fact in facts]
        if depth is None:
            middle, _, end = self._choose_passage(0, room, rng)
            return self._scatter(written, middle, end, rng)
        fact, *others = written
        before, after, room_before = deal(others, self._counter.costs(others).tolist(), depth, room, rng)
        middle, start, end = self._choose_passage(room_before, room, rng)
        return "".join(
            [self._scatter(before, start, middle, rng), fact, self._scatter(after, middle, end, rng)]
        )

    def text_of(self, room: int, rng: Random) -> str:
        """A passage of nearly so many tokens from the beginning of a sentence."""
        return self.hide([], None, room, rng)

    def _choose_passage(self, room_before: int, room: int, rng: Random) -> tuple[int, int, int]:
        """Middle, start and end, in pieces, of a passage that has a sentence begin in its middle."""
        middles = np.asarray(rng.choices(self._starts, k=NUM_CANDIDATES))
        starts = self._piece_at(self._cost_of(middles) - room_before, "left")
        missing_before = room_before - (self._cost_of(middles) - self._cost_of(starts))
        used = self._cost_of(starts) + room
        ends = np.maximum(self._piece_at(used, "right") - 1, middles)
        chosen = int(np.argmin(used - self._cost_of(ends) + np.abs(missing_before)))
        return int(middles[chosen]), int(starts[chosen]), int(ends[chosen])

    def _cost_of(self, pieces: np.ndarray) -> np.ndarray:
        """Tokens before pieces that are counted on around the circle."""
        rounds, rest = np.divmod(pieces, self._num_pieces)
        return rounds * self._costs[-1] + self._costs[rest]

    def _piece_at(self, costs: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        rounds, rest = np.divmod(costs, self._costs[-1])
        return rounds * self._num_pieces + np.searchsorted(self._costs[:-1], rest, side)

    def _scatter(self, facts: Sequence[str], start: int, end: int, rng: Random) -> str:
        """The passage with facts between its sentences, in their order."""
        first, last = self._cost_of(np.asarray([start, end])).tolist()
        wished = self._piece_at(np.asarray(sorted(rng.randint(first, last) for _ in facts)), "right")
        text, done = [], start
        for fact, piece in zip(facts, wished.tolist(), strict=True):
            position = max(self._sentence_before(piece), start)
            text += [self._slice(done, position), fact]
            done = position
        return "".join([*text, self._slice(done, end)])

    def _sentence_before(self, piece: int) -> int:
        """Where the sentence of a piece begins."""
        rounds, rest = divmod(piece - 1, self._num_pieces)
        return rounds * self._num_pieces + self._starts[bisect.bisect_right(self._starts, rest) - 1]

    def _slice(self, start: int, end: int) -> str:
        """The text from one piece to another."""
        first, skipped = divmod(start, self._num_pieces)
        last, left = divmod(end, self._num_pieces)
        return (self._text * (last - first) + self._text[: self._offsets[left]])[self._offsets[skipped] :]


class Lookalikes:
    """A haystack of facts of the same form.

    Whole facts rarely fill a text to the token or meet a depth; what is left at either end, less than one
    fact, is filled with noise.

    Args:
        counter: of tokens.
        draw: makes so many of them, none with a key or a value that occurs in the text given.
    """

    separator = "\n"

    def __init__(self, counter: TokenCounter, draw: Callable[[int, Random, str], list[str]]) -> None:
        self._counter, self._draw = counter, draw
        self._noise = noise(counter)
        sample = [self.separator + fact for fact in draw(8, Random(0), "")]
        self._typical_cost = max(float(counter.costs(sample).mean()), 1.0)

    def hide(self, facts: Sequence[str], depth: float | None, room: int, rng: Random) -> str:
        """As of a `Haystack`; facts without a depth are shuffled among the others."""
        num_asked = 0 if depth is None else 1
        written = [self.separator + fact for fact in facts]
        others = written[num_asked:]
        before, after, room_before = deal(
            others, self._counter.costs(others).tolist(), depth or 0.0, room, rng
        )
        room_after = room - room_before
        # Some more than will do, to have small ones for small gaps.
        num_drawn = int(1.1 * room / self._typical_cost) + 4
        drawn = [self.separator + fact for fact in self._draw(num_drawn, rng, "".join(facts))]
        for fact, cost in zip(drawn, self._counter.costs(drawn).tolist(), strict=True):
            if cost <= room_before:
                before.append(fact)
                room_before -= cost
            elif cost <= room_after:
                after.append(fact)
                room_after -= cost
        rng.shuffle(before)
        rng.shuffle(after)
        # At the ends, where it does not point at the asked fact.
        first, last = self._noise.text_of(room_before, rng), self._noise.text_of(room_after, rng)
        return "".join([first, *before, *written[:num_asked], *after, last])


def deal(
    facts: Sequence[str], costs: Sequence[int], depth: float, room: int, rng: Random
) -> tuple[list[str], list[str], int]:
    """Deals facts to the two sides of a depth; also returns how much of `room` is left before it."""
    left_before = round(depth * (room + sum(costs)))
    left_after = room + sum(costs) - left_before
    before: list[str] = []
    after: list[str] = []
    for fact, cost in zip(facts, costs, strict=True):
        if cost <= left_before and (rng.random() < depth or cost > left_after):
            before.append(fact)
            left_before -= cost
        else:
            after.append(fact)
            left_after -= cost
    return before, after, min(left_before, room)


def hidden_fact_items(
    counter: TokenCounter,
    sampling: Sampling,
    haystack: Haystack,
    puzzles: Sequence[Puzzle],
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
) -> Iterator[GenerationItem]:
    """Items of puzzles, one for each example's number, whose facts are hidden in a haystack.

    Raises:
        DataError: a length is too short for a puzzle.
    """
    # With one word of the haystack at the end, since a full stop and a line's end may merge.
    filler = haystack.separator + "the"
    bare = [
        "".join(
            [puzzle.opening, *(haystack.separator + fact for fact in puzzle.facts), filler, puzzle.question]
        )
        for puzzle in puzzles
    ]
    (filler_cost,) = counter.costs([filler]).tolist()
    bases = [count - filler_cost for count in map(counter.count, bare)]
    sampling.require(max(bases) + max_new_tokens, "the facts and the question")

    def build(number: int, length: int, room: int) -> str:
        puzzle = puzzles[number]
        rng = sampling.random(number, length)
        return puzzle.opening + haystack.hide(puzzle.facts, puzzle.depth, room, rng) + puzzle.question

    def make(number: int, length: int) -> GenerationItem:
        puzzle = puzzles[number]
        prompt = fit(
            counter, length - max_new_tokens, bases[number], functools.partial(build, number, length)
        )
        depth = {} if puzzle.depth is None else {"depth": puzzle.depth}
        return GenerationItem(
            id=f"{length}/{number}",
            prompt=prompt,
            references=puzzle.references,
            max_new_tokens=max_new_tokens,
            stop=stop,
            metadata={"length": length, **depth, **puzzle.metadata},
            answer=puzzle.answer,
        )

    return itertools.starmap(make, sampling.examples())
