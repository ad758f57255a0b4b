"""The generated tasks as their tests make them, and solvers that know nothing of how they are made."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.common_words import common_words
from ssmlora_dist.evaluation.tasks.frequent_words import frequent_words
from ssmlora_dist.evaluation.tasks.needles import NEEDLE_VARIANTS, needles
from ssmlora_dist.evaluation.tasks.passkey import passkey
from ssmlora_dist.evaluation.tasks.variable_tracking import variable_tracking

DEPTHS = (0.0, 0.25, 0.5, 0.9, 1.0)

NEEDLE = re.compile(r"A secret \w+ of (\S+) is (\S+)\.")


def solve_passkey(prompt: str) -> list[str]:
    return re.findall(r"The pass key is (\d+)\.", prompt)


def solve_needles(prompt: str) -> list[str]:
    text, question = prompt.split("\nQuestion: ")
    keys = re.split(", | and ", re.search(r" of (.*)\?", question)[1])
    facts = NEEDLE.findall(text)
    # Facts stand in any order, so values of one key are in none.
    return [value for asked in keys for key, value in facts if key == asked]


def solve_variables(prompt: str) -> list[str]:
    text, question = prompt.split("\nText:")[-1].split("\nQuestion: ")
    wanted = re.search(r"the value (\d+)\?", question)[1]
    values: dict[str, str] = {}
    for name, source in re.findall(r"Let ([A-Z]{5}) = (\w+)\.", text):
        values[name] = values.get(source, source)
    return [name for name, value in values.items() if value == wanted]


def solve_common_words(prompt: str) -> list[str]:
    text = prompt.split("\nList:")[-1].split("\nQuestion: ")[0]
    entries = re.findall(r" (\d+)\. (\S+)", text)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    return clearly_most_frequent([word for _, word in entries], 10)


def solve_frequent_words(prompt: str) -> list[str]:
    text = prompt.split("\nText:")[1].split("\nQuestion: ")[0]
    return clearly_most_frequent([word for word in text.split() if word != "..."], 3)


def clearly_most_frequent(words: Sequence[str], count: int) -> list[str]:
    """Those words, in no order, if no other is as frequent."""
    ranked = Counter(words).most_common()
    assert len(ranked) == count or ranked[count - 1][1] > ranked[count][1]
    return [word for word, _ in ranked[:count]]


@dataclass(frozen=True)
class Generated:
    """A task in tests.

    Args:
        make: of tokenizer, lengths, number of examples, split and seed.
        solve: gives the references of a prompt.
        least: a length that holds it in words.
        ordered: whether the solver knows the order of the references.
    """

    make: Callable[..., Iterator[GenerationItem]]
    solve: Callable[[str], list[str]]
    least: int = 256
    ordered: bool = True


GENERATED: Mapping[str, Generated] = {
    "passkey": Generated(partial(passkey, depths=DEPTHS), solve_passkey),
    **{
        f"niah_{name}": Generated(
            partial(needles, variant=variant, depths=DEPTHS), solve_needles, 512, name != "multivalue"
        )
        for name, variant in NEEDLE_VARIANTS.items()
    },
    "variable_tracking": Generated(variable_tracking, solve_variables, 512),
    "variable_tracking_3": Generated(partial(variable_tracking, num_chains=3), solve_variables, 512),
    "common_words": Generated(common_words, solve_common_words, 1024, ordered=False),
    "frequent_words": Generated(frequent_words, solve_frequent_words, 512, ordered=False),
}


def make(name: str, tokenizer: Any, lengths: Sequence[int], num_examples: int, **changes: Any) -> Any:
    settings = {"split": "test", "seed": 0} | changes
    return GENERATED[name].make(tokenizer, lengths=lengths, num_examples=num_examples, **settings)


def num_tokens(tokenizer: Any, prompt: str) -> int:
    return len(tokenizer(prompt)["input_ids"])


PLACES = ("kitchen", "garden", "office", "bathroom", "hallway", "bedroom")


def write_stories(path: Path, num_stories: int, seed: int = 0) -> Path:
    """A file in the form of bAbI's first task: five questions a story, each after two more moves."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_stories):
        number, where = 0, {}
        for _ in range(5):
            for _ in range(2):
                number += 1
                name, place = rng.choice(("Mary", "John", "Daniel")), rng.choice(PLACES)
                where[name] = (place, number)
                lines.append(f"{number} {name} went to the {place}.")
            number += 1
            name = rng.choice(sorted(where))
            lines.append(f"{number} Where is {name}? \t{where[name][0]}\t{where[name][1]}")
    path.write_text("\n".join(lines) + "\n")
    return path
