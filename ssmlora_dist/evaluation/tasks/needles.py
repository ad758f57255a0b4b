"""Needles in a haystack: the eight variants of RULER (arXiv 2404.06654)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.haystack import (
    Haystack,
    Lookalikes,
    Puzzle,
    background,
    hidden_fact_items,
    noise,
)
from ssmlora_dist.evaluation.tasks.lengths import Sampling, TokenCounter
from ssmlora_dist.evaluation.tasks.names import draw_names

MAX_NEW_TOKENS = 128

Kind = Literal["words", "numbers", "uuids"]
SINGULAR: Mapping[str, str] = {"words": "word", "numbers": "number", "uuids": "identifier"}

OPENING_ONE = "A secret {kind} is hidden in the text below. Remember it: it is asked for at the end.\nText:"
OPENING_MANY = (
    "Secret {kind}s are hidden in the text below. Remember them: they are asked for at the end.\nText:"
)
FACT = "A secret {kind} of {key} is {value}."
QUESTION_ONE = "\nQuestion: What is the secret {kind} of {keys}?\nAnswer: The secret {kind} of {keys} is"
QUESTION_MANY = "\nQuestion: What are all secret {kind}s of {keys}?\nAnswer: The secret {kind}s of {keys} are"


@dataclass(frozen=True)
class NeedleVariant:
    """What is hidden where, and how much of it is asked for.

    Args:
        haystack: `noise`: one line repeated; `prose`; `needles`: facts of the same form.
        key_kind: what keys are.
        value_kind: what values are.
        num_keys: how many keys are hidden, at least those asked for.
        num_values: how many values each of them has.
        num_queries: how many keys are asked for.
    """

    haystack: Literal["noise", "prose", "needles"]
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def asks_for_one(self) -> bool:
        """Whether the answer is one value."""
        return self.num_queries * self.num_values == 1


NEEDLE_VARIANTS: Mapping[str, NeedleVariant] = {
    "single_1": NeedleVariant("noise"),
    "single_2": NeedleVariant("prose"),
    "single_3": NeedleVariant("prose", value_kind="uuids"),
    "multikey_1": NeedleVariant("prose", num_keys=4),
    "multikey_2": NeedleVariant("needles"),
    "multikey_3": NeedleVariant("needles", key_kind="uuids", value_kind="uuids"),
    "multivalue": NeedleVariant("prose", num_values=4),
    "multiquery": NeedleVariant("prose", num_keys=4, num_queries=4),
}


def needles(
    tokenizer: Any,
    variant: NeedleVariant,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    num_examples: int,
    split: str,
    seed: int,
    text: str | None = None,
) -> Iterator[GenerationItem]:
    """Generates items that ask for the values of one key or of several.

    Haystacks, kinds and numbers of keys, values and queries and the answer's budget are RULER's. Other than
    there: the wording is our own; the prose is not essays by Paul Graham; the asked fact lies at a chosen
    depth where there is one; no key and no value occurs twice in a prompt; facts of the same form are topped
    up with noise, less than one fact of it at either end, so that length and depth are met.

    Args:
        tokenizer: of the model.
        variant: one of `NEEDLE_VARIANTS`, or another.
        lengths: tokens of the prompt and of the answer's budget together. Prompts are within one word of
            the haystack of it, and never above.
        depths: shares of the haystack before the asked fact, from 0 to 1; examples of each length cycle over
            them. Not used where several facts are asked for: these lie anywhere.
        num_examples: of each length.
        split: `train`, `validation` or `test`; they have no key and no value in common.
        seed: of keys, values, places and passages.
        text: the prose, instead of the language reference of the interpreter.

    Returns:
        Items of which number i, whatever the number of examples, is always the same. The references are all
        the values asked for; RULER's score is the share of them that the answer contains.

    Raises:
        DataError: a length is too short, the split has too few keys, the text is empty or of no use.
    """
    if variant.num_queries > variant.num_keys:
        raise DataError(
            f"needles: num_queries {variant.num_queries} is more than num_keys {variant.num_keys}; hide as "
            "many keys as are asked for"
        )
    if text is not None and variant.haystack != "prose":
        raise DataError(
            f"needles: a text is given and this variant hides its facts in {variant.haystack}; give "
            "none, or take a variant with prose such as single_2"
        )
    sampling = Sampling("needles", tuple(lengths), num_examples, split, seed)
    counter = TokenCounter(tokenizer)
    puzzles = [
        _draw_puzzle(variant, split, depths[number % len(depths)], sampling.random(number, variant))
        for number in range(num_examples)
    ]
    haystack: Haystack
    if variant.haystack == "needles":
        haystack = Lookalikes(
            counter, lambda count, rng, avoid: _draw_facts(variant, split, count, rng, avoid)
        )
    else:
        haystack = noise(counter) if variant.haystack == "noise" else background(counter, text)
    return hidden_fact_items(counter, sampling, haystack, puzzles, MAX_NEW_TOKENS)


def _draw_puzzle(variant: NeedleVariant, split: str, depth: float, rng: Random) -> Puzzle:
    kind = SINGULAR[variant.value_kind]
    keys = draw_names(variant.key_kind, variant.num_keys, split, rng)
    num_values = variant.num_values
    values = draw_names(variant.value_kind, len(keys) * num_values, split, rng, avoid=" ".join(keys))
    facts = [
        FACT.format(kind=kind, key=keys[number // num_values], value=value)
        for number, value in enumerate(values)
    ]
    asked = keys[: variant.num_queries]
    references = tuple(values[: len(asked) * num_values])
    named = _listed(asked)
    if variant.asks_for_one:
        question = QUESTION_ONE.format(kind=kind, keys=named)
        answer = f" {references[0]}"
        return Puzzle(OPENING_ONE.format(kind=kind), tuple(facts), question, references, answer, depth)
    value_of = dict(zip(facts, values, strict=True))
    rng.shuffle(facts)
    question = QUESTION_MANY.format(kind=kind, keys=named)
    # As they can be known: key by key as asked, the values of each in the order of the text.
    told = [value_of[fact] for fact in facts]
    ordered = sorted(references, key=lambda value: (values.index(value) // num_values, told.index(value)))
    answer = f" {_listed(ordered)}"
    return Puzzle(OPENING_MANY.format(kind=kind), tuple(facts), question, references, answer)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _draw_facts(variant: NeedleVariant, split: str, count: int, rng: Random, avoid: str) -> list[str]:
    keys = draw_names(variant.key_kind, count, split, rng, avoid)
    # Of the one kind that can coincide with keys.
    if variant.value_kind == variant.key_kind == "words":
        avoid += " ".join(keys)
    values = draw_names(variant.value_kind, count, split, rng, avoid)
    return [
        FACT.format(kind=SINGULAR[variant.value_kind], key=key, value=value)
        for key, value in zip(keys, values, strict=True)
    ]
