"""The built-in task: one fact at a chosen depth of a real text among look-alike facts, and a question for it.

Everything is drawn from the seed. Keys and values are divided among the splits by a fixed hash, so training,
validation and test share none of either, whatever the seeds and the numbers of examples. The text is the
Python language reference that comes with the interpreter, so it differs a little between Python versions.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlora_dist.data.examples import Example
from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import counted
from ssmlora_dist.prose import KEYS, sentences, split_of
from ssmlora_dist.tokenization import TextEncoder

FACT = " The access code for {key} is {value}."
QUESTION = "\nWhat is the access code for {key}?\nAnswer:"
ANSWER = " {value}"


@dataclass(frozen=True)
class Corpus:
    """Prose as one circular row of tokens.

    Args:
        ids: [N].
        starts_sentence: [N], true where a sentence begins.
    """

    ids: NDArray[np.int32]
    starts_sentence: NDArray[np.bool_]


@dataclass(frozen=True)
class Puzzle:
    """What is hidden and asked in one example, encoded."""

    key: str
    value: str
    fact: list[int]
    lookalikes: list[list[int]]
    question: list[int]
    answer: list[int]

    @property
    def least_length(self) -> int:
        """Tokens that always suffice, at any depth: one more fact of room lets every fact find its side."""
        facts = [self.fact, *self.lookalikes]
        slack = max(map(len, facts)) if self.lookalikes else 0
        return sum(map(len, facts)) + slack + len(self.question) + len(self.answer) + 1


def generate_retrieval(
    tokenizer: Any,
    split: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_lookalikes: int,
    num_digits: int,
    num_examples: int,
    seed: int,
) -> list[Example]:
    """Generates examples that cycle over lengths and depths.

    Every example is exactly as long as asked, end-of-sequence token included, and its fact begins exactly at
    the asked fraction of the text before the question (0: first, 1: last). Example i depends on the arguments
    other than `num_examples` and on i alone.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        split: `train`, `validation` or `test`.
        lengths: tokens of prompt, answer and end-of-sequence token together.
        depths: fractions from 0 to 1.
        num_lookalikes: facts of the same form with other keys and values.
        num_digits: digits of a value.
        num_examples: how many examples.
        seed: of the passages, keys, values and places.

    Returns:
        Examples whose targets are the value and the end-of-sequence token, scored on the value alone, with
        `length`, `depth`, `key` and `value` as metadata.

    Raises:
        DataError: a length cannot hold the facts and the question, or the split has too few keys or values.
    """
    encoder = TextEncoder(tokenizer)
    keys = [key for key in KEYS if split_of(key) == split]
    _check_supply(split, len(keys), num_lookalikes, num_digits)
    puzzles = [
        _draw_puzzle(
            encoder, split, keys, num_lookalikes, num_digits, random.Random(f"{seed}/{split}/{i}/puzzle")
        )
        for i in counted(range(num_examples), f"drawing facts for {split}", num_examples)
    ]
    least_length = len(encoder.bos_ids) + max((puzzle.least_length for puzzle in puzzles), default=0)
    for length in lengths:
        if length < least_length:
            raise DataError(
                f"retrieval.lengths: {length} tokens cannot hold {num_lookalikes + 1} facts and the question "
                f"with this tokenizer; use at least {least_length}, or fewer look-alikes"
            )
    corpus = _encode_corpus(encoder)
    settings = list(itertools.product(lengths, depths))
    examples = []
    for i, puzzle in enumerate(counted(puzzles, f"generating examples for {split}", num_examples)):
        length, depth = settings[i % len(settings)]
        rng = random.Random(f"{seed}/{split}/{i}/passage")
        examples.append(_assemble(puzzle, corpus, encoder.bos_ids, length, depth, rng))
    return examples


def _check_supply(split: str, num_keys: int, num_lookalikes: int, num_digits: int) -> None:
    """Raises if the split owns fewer keys or values than one example needs."""
    # From five digits on there are more values than keys.
    values = range(10 ** (num_digits - 1), 10**num_digits) if num_digits < 5 else ()
    num_values = sum(split_of(str(value)) == split for value in values) if values else num_keys
    if num_lookalikes >= num_keys:
        raise DataError(
            f"retrieval.num_lookalikes: {num_lookalikes} is more than the keys that {split} has; "
            f"use at most {num_keys - 1}"
        )
    if num_lookalikes >= num_values:
        raise DataError(
            f"retrieval.num_digits: {num_digits} gives {split} only {num_values} values, where one example "
            f"needs {num_lookalikes + 1}; use more digits or fewer look-alikes"
        )


def _draw_puzzle(
    encoder: TextEncoder,
    split: str,
    keys: Sequence[str],
    num_lookalikes: int,
    num_digits: int,
    rng: random.Random,
) -> Puzzle:
    chosen_keys = rng.sample(keys, num_lookalikes + 1)
    values: list[str] = []
    while len(values) < len(chosen_keys):
        value = str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))
        if value not in values and split_of(value) == split:
            values.append(value)
    facts = [
        encoder.encode_continuation(FACT.format(key=key, value=value))
        for key, value in zip(chosen_keys, values, strict=True)
    ]
    key, value = chosen_keys[0], values[0]
    question = encoder.encode_continuation(QUESTION.format(key=key))
    answer = encoder.encode_continuation(ANSWER.format(value=value))
    return Puzzle(key, value, facts[0], facts[1:], question, [*answer, encoder.eos_id])


def _encode_corpus(encoder: TextEncoder) -> Corpus:
    """The prose of the language reference, sentence by sentence."""
    ids: list[int] = []
    starts: list[int] = []
    for sentence in sentences():
        starts.append(len(ids))
        ids.extend(encoder.encode_continuation(f" {sentence}"))
    starts_sentence = np.zeros(len(ids), dtype=np.bool_)
    starts_sentence[starts] = True
    return Corpus(np.asarray(ids, dtype=np.int32), starts_sentence)


def _assemble(
    puzzle: Puzzle,
    corpus: Corpus,
    bos_ids: Sequence[int],
    length: int,
    depth: float,
    rng: random.Random,
) -> Example:
    """Lays prose and look-alikes around the fact so that length and depth come out exactly.

    The fact stands between two sentences of the corpus; what is left over is cut from the far ends.
    """
    around = length - len(bos_ids) - len(puzzle.fact) - len(puzzle.question) - len(puzzle.answer)
    num_before = round(depth * around)
    before, after, room_before, room_after = _choose_sides(
        puzzle.lookalikes, num_before, around - num_before, depth, rng
    )
    middle = int(rng.choice(np.flatnonzero(corpus.starts_sentence)))
    window = np.arange(middle - room_before, middle + room_after) % len(corpus.ids)
    ids, starts = corpus.ids[window], corpus.starts_sentence[window]
    prompt = [
        *bos_ids,
        *_scatter(before, ids[:room_before], starts[:room_before], rng),
        *puzzle.fact,
        *_scatter(after, ids[room_before:], starts[room_before:], rng),
        *puzzle.question,
    ]
    return Example.from_tokens(
        [*prompt, *puzzle.answer],
        [False] * len(prompt) + [True] * len(puzzle.answer),
        num_scored=len(puzzle.answer) - 1,
        metadata={"length": length, "depth": depth, "key": puzzle.key, "value": puzzle.value},
    )


def _choose_sides(
    lookalikes: Sequence[list[int]], room_before: int, room_after: int, depth: float, rng: random.Random
) -> tuple[list[list[int]], list[list[int]], int, int]:
    """Deals look-alikes to the two sides of the fact; also returns the tokens left for prose on each."""
    before: list[list[int]] = []
    after: list[list[int]] = []
    for lookalike in lookalikes:
        fits_before, fits_after = len(lookalike) <= room_before, len(lookalike) <= room_after
        if fits_before and (rng.random() < depth or not fits_after):
            before.append(lookalike)
            room_before -= len(lookalike)
        else:
            after.append(lookalike)
            room_after -= len(lookalike)
    return before, after, room_before, room_after


def _scatter(
    facts: Sequence[list[int]], ids: NDArray[np.int32], starts_sentence: NDArray[np.bool_], rng: random.Random
) -> list[int]:
    """Puts facts between sentences of a stretch of prose."""
    choices = np.flatnonzero(starts_sentence).tolist() or [0]
    positions = sorted(rng.choice(choices) for _ in facts)
    pieces: list[int] = []
    done = 0
    for position, fact in zip(positions, facts, strict=True):
        pieces.extend(ids[done:position].tolist())
        pieces.extend(fact)
        done = position
    pieces.extend(ids[done:].tolist())
    return pieces
