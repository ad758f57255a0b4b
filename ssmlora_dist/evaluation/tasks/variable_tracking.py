"""Variable tracking of RULER (arXiv 2404.06654): which variables have a value, over chains of assignments."""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.haystack import NOISE, Puzzle, background, hidden_fact_items, noise
from ssmlora_dist.evaluation.tasks.lengths import Sampling, TokenCounter
from ssmlora_dist.evaluation.tasks.names import draw_letters, draw_number, draw_owned

MAX_NEW_TOKENS = 30

OPENING = "Variables are assigned in the text below. Keep track of the value that each of them has.\nText:"
FIRST = "Let {name} = {value}."
NEXT = "Let {name} = {source}."
QUESTION = (
    "\nQuestion: Which variables have the value {value}?"
    "\nAnswer: By the assignments in the text, {count} variables have the value {value}:"
)


def variable_tracking(
    tokenizer: Any,
    *,
    lengths: Sequence[int],
    num_examples: int,
    split: str,
    seed: int,
    num_chains: int = 1,
    num_hops: int = 4,
    num_fewshot: int = 1,
    text: str | None = None,
) -> Iterator[GenerationItem]:
    """Generates items that ask for all variables of one chain of assignments.

    Chains, names of five letters, values of five digits, the solved example before the task and the answer's
    budget are RULER's defaults. Other than there: the wording is our own, and the solved example has one line
    of noise in it rather than some 400 tokens, so that short inputs can have it too.

    Args:
        tokenizer: of the model.
        lengths: tokens of the prompt and of the answer's budget together. Prompts are within one word of
            the haystack of it, and never above.
        num_examples: of each length.
        split: `train`, `validation` or `test`; they have no variable and no value in common.
        seed: of names, values, places and passages.
        num_chains: chains, of which one is asked for.
        num_hops: assignments in each after its first.
        num_fewshot: solved examples before the task.
        text: hides the assignments, instead of one line repeated.

    Returns:
        Items of which number i, whatever the number of examples, is always the same. The references are all
        variables of the chain asked for; RULER's score is the share of them that the answer contains.

    Raises:
        DataError: a length is too short, the text is empty.
    """
    sampling = Sampling("variable_tracking", tuple(lengths), num_examples, split, seed)
    counter = TokenCounter(tokenizer)
    puzzles = [
        _draw_puzzle(split, num_chains, num_hops, num_fewshot, sampling.random(number))
        for number in range(num_examples)
    ]
    haystack = noise(counter) if text is None else background(counter, text)
    return hidden_fact_items(counter, sampling, haystack, puzzles, MAX_NEW_TOKENS)


def _draw_puzzle(split: str, num_chains: int, num_hops: int, num_fewshot: int, rng: Random) -> Puzzle:
    num_problems = num_fewshot + 1
    draw_value = functools.partial(draw_number, num_digits=5)
    draw_name = functools.partial(draw_letters, num_letters=5, alphabet=string.ascii_uppercase)
    values = draw_owned(draw_value, num_problems * num_chains, split, rng)
    names = draw_owned(draw_name, num_problems * num_chains * (num_hops + 1), split, rng)
    chains = [names[start : start + num_hops + 1] for start in range(0, len(names), num_hops + 1)]
    opening = ""
    for problem in range(num_fewshot):
        mine = slice(problem * num_chains, (problem + 1) * num_chains)
        lines = _mixed(chains[mine], values[mine], rng)
        lines.insert(rng.randrange(1, len(lines) + 1), NOISE[0])
        solved = chains[mine.start]
        question = QUESTION.format(value=values[mine.start], count=len(solved))
        opening += "\n".join([OPENING, *lines]) + question + _answer(solved) + "\n\n"
    asked = num_fewshot * num_chains
    facts = _mixed(chains[asked:], values[asked:], rng)
    question = QUESTION.format(value=values[asked], count=num_hops + 1)
    return Puzzle(opening + OPENING, tuple(facts), question, tuple(chains[asked]), _answer(chains[asked]))


def _answer(chain: Sequence[str]) -> str:
    return " " + " ".join(chain)


def _mixed(chains: Sequence[Sequence[str]], values: Sequence[str], rng: Random) -> list[str]:
    """The assignments of several chains, each chain's in its order."""
    waiting = [
        [FIRST.format(name=chain[0], value=value)]
        + [NEXT.format(name=name, source=source) for source, name in itertools.pairwise(chain)]
        for chain, value in zip(chains, values, strict=True)
    ]
    turns = [turn for turn, chain in enumerate(waiting) for _ in chain]
    rng.shuffle(turns)
    return [waiting[turn].pop(0) for turn in turns]
