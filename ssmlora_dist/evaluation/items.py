"""What a task asks a model, item by item, and what came of it: plain data, without model or files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ssmlora_dist.records import UnusedFields


@dataclass(frozen=True)
class ChoiceItem:
    """A question with answers to choose from.

    Args:
        id: names the item within its task, the same whenever the task is made from the same settings.
        prompt: what comes before the answer, without spaces at its end.
        choices: the answers as they continue the prompt, the space between them included; at least two, none
            empty.
        label: which of them is right.
        metadata: in JSON types, what reports group by: `length` in tokens, `depth` from 0 to 1.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    label: int
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationItem:
    """A question that is answered in the model's own words, greedily.

    Args:
        id: as of a `ChoiceItem`.
        prompt: what the answer continues.
        references: right answers: any of them, or all of them, as the task's scorer has it; at least one.
        max_new_tokens: where the answer is cut off.
        stop: texts before which the answer ends; the end-of-sequence token always ends it.
        metadata: as of a `ChoiceItem`.
        answer: what a model is trained to answer: all references as they continue the prompt, the space
            between them included; empty for items of records, which training reads itself. Not asked.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    answer: str = field(default="", repr=False)


@dataclass(frozen=True)
class FailedItem:
    """An item that could not be made of its record, or not be given to the model.

    Args:
        id: as of a `ChoiceItem`.
        error: why, with the place of the record.
    """

    id: str
    error: str


Item = ChoiceItem | GenerationItem


@dataclass(frozen=True)
class ChoiceAnswer:
    """Log-likelihoods of an item's choices given its prompt, in nats, summed over tokens."""

    log_likelihoods: tuple[float, ...]


@dataclass(frozen=True)
class GenerationAnswer:
    """What the model wrote, cut before the first stop text."""

    text: str


Answer = ChoiceAnswer | GenerationAnswer
Scorer = Callable[[Any, Any], Mapping[str, float]]
"""Of an item and its answer: metric name to a value from 0 to 1. Pure."""


@dataclass(frozen=True)
class Task:
    """Items and how they are scored.

    Args:
        name: of the task, in tables and files.
        items: makes them, one after another, the same every time; records that cannot be used come as
            `FailedItem`.
        score: of one answer.
        metric: the name of the score that stands for the task in tables.
        unused: filled while items are made: the fields of its records that nobody reads.
    """

    name: str
    items: Callable[[], Iterator[Item | FailedItem]]
    score: Scorer
    metric: str
    unused: UnusedFields = field(default_factory=UnusedFields)
