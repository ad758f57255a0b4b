"""One rank of an evaluation: `python -m tests.distributed.evaluation_worker DIRECTORY [BATCHES]`.

With a launcher's variables set. After so many batches it kills itself, as nothing that can be caught would.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ssmlora_dist.evaluation.items import ChoiceItem, GenerationItem, Task
from ssmlora_dist.evaluation.runner import run
from ssmlora_dist.models.tokenizer import load_tokenizer
from ssmlora_dist.progress import Work, shown_by

from ..tiny import adapted_model
from ..told import Told

NUM_ITEMS = 60
VOCAB_SIZE = 259


def tasks() -> list[Task]:
    """Choices and generation, of many lengths."""
    draw = random.Random(0)
    words = lambda: "".join(draw.choice("abcd ") for _ in range(draw.randrange(1, 30))).strip() or "a"  # noqa: E731
    choices = [
        ChoiceItem(f"c{i}", words(), tuple(f" {words()}" for _ in range(2 + i % 3)), i % 2)
        for i in range(NUM_ITEMS)
    ]
    prompts = [GenerationItem(f"g{i}", words(), ("a",), 2 + i % 9, ("e",)) for i in range(NUM_ITEMS)]
    return [
        Task("choices", lambda: iter(choices), _first_is_likeliest, "acc"),
        Task("answers", lambda: iter(prompts), _is_empty, "empty"),
    ]


def _first_is_likeliest(item: Any, answer: Any) -> Mapping[str, float]:
    return {"acc": float(max(answer.log_likelihoods) == answer.log_likelihoods[0])}


def _is_empty(item: Any, answer: Any) -> Mapping[str, float]:
    return {"empty": float(not answer.text)}


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main() -> None:
    directory, die_after = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo")
    told, names = [0], [task.name for task in tasks()]

    def count(work: Work, done: int) -> None:
        told[0] += work.description in names
        if told[0] == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with shown_by(Told(count)):
            run(
                tasks(),
                adapted_model(vocab_size=VOCAB_SIZE),
                load_tokenizer("bytes"),
                max_batch_tokens=200,
                directory=directory,
                rank=dist.get_rank(),
                size=dist.get_world_size(),
                gather=gather,
            )
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
