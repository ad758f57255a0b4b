"""What `launch/evaluate.py` is given in its tests: a model, adapters, tasks, and command lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ssmlora_dist import AdapterConfig, add_adapters, save_adapter
from ssmlora_dist.models import base_fingerprint, load_model

from ..tiny import randomize_adapters, tiny_config
from .processes import ROOT

EVALUATE_SCRIPT = ROOT / "launch" / "evaluate.py"
CONFIG_FILE = "run.json"
MAX_LENGTH = 384
MODEL = tiny_config(num_layers=2, vocab_size=259, max_position_embeddings=MAX_LENGTH, bos_token_id=256)
ADAPTER = AdapterConfig(rank=2, alpha=4)
LENGTHS, DEPTHS, NUM_EXAMPLES = (256, 320), (0.0, 1.0), 6
CAPITALS = {"France": "Paris", "Italy": "Rome", "Ghana": "Accra", "Peru": "Lima"}
LONG = "Is it? " * 60
"""More tokens than the model takes."""

LETTERS = list("abcdefgh")
# As many as it takes for the adapter to choose otherwise than the base model. The last two fail: one has a
# label that is none, and one is too long.
QUESTIONS: list[dict[str, Any]] = [
    *({"question": f"Letter {37 * i}?", "choices": LETTERS, "label": i % 8} for i in range(24)),
    {"question": "Letter?", "choices": LETTERS, "label": "true"},
    {"question": LONG, "choices": LETTERS, "label": 1},
]
NUM_LETTERS_FAILED = 2
_ROW = {"question": "Sky?", "choices": ["red", "blue"], "label": 1}
_BROKEN = {
    "string_labels": [{**_ROW, "label": "true"}],
    "missing_field": [{"question": "Sky?", "choices": ["red", "blue"]}],
    "empty_choice": [{**_ROW, "choices": ["red", ""]}],
}
TASKS: list[dict[str, Any]] = [
    {"task": "passkey", "lengths": LENGTHS, "depths": DEPTHS, "num_examples": NUM_EXAMPLES},
    {"task": "multiple_choice", "name": "letters", "path": "letters.jsonl"},
    {
        "task": "generation",
        "name": "capitals",
        "path": "capitals.jsonl",
        "prompt": "Capital of {country}:",
        "fields": {"references": "capital"},
        "max_new_tokens": 6,
        "metrics": ["exact_match", "f1"],
    },
]
RUN: dict[str, Any] = {
    "run": {"name": "run", "output_dir": "runs"},
    "model": {"init": "random", "config": MODEL, "tokenizer": "bytes", "compute_dtype": "float32"},
    # Not those of the adapter directories, which say themselves what they are.
    "adapter": {"rank": 4},
    "data": {"train": {"format": "task", "task": {"task": "passkey"}}},
    "training": {"max_steps": 1},
    # Of several batches for each task.
    "evaluation": {"tasks": TASKS, "max_batch_tokens": 300},
    "tracking": {"tracker": "none"},
}


def prepare(directory: Path) -> None:
    """Fills a directory."""
    rows = {
        "letters": QUESTIONS,
        "capitals": [{"country": country, "capital": city} for country, city in CAPITALS.items()],
        "corrupt": [_ROW, '{"question": "Sky?"'],
        **_BROKEN,
    }
    for name, records in rows.items():
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (directory / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    absolute = [
        {**task, **({"path": str(directory / task["path"])} if "path" in task else {})} for task in TASKS
    ]
    run = {
        **RUN,
        "run": {**RUN["run"], "output_dir": str(directory / "runs")},
        "evaluation": {**RUN["evaluation"], "tasks": absolute},
    }
    (directory / CONFIG_FILE).write_text(json.dumps(run))
    fingerprints = [base_fingerprint(init="random", config=MODEL, seed=seed) for seed in (0, 1)]
    for name, seed, config, fingerprint in (
        ("first/adapter", 1, ADAPTER, fingerprints[0]),
        ("second/adapter", 2, ADAPTER, fingerprints[0]),
        ("rescaled/adapter", 1, AdapterConfig(rank=2, alpha=8), fingerprints[0]),
        ("foreign/adapter", 1, ADAPTER, fingerprints[1]),
    ):
        model = load_model(init="random", config=MODEL, quantization="nf4", compute_dtype=torch.float32)
        add_adapters(model, config)
        randomize_adapters(model, seed)
        save_adapter(model, directory / name, base_fingerprint=fingerprint)
    (directory / "empty" / "adapter").mkdir(parents=True)
    # Of another size, with nothing that says so.
    wider = load_model(
        init="random", config=MODEL | {"hidden_size": 32}, quantization="none", compute_dtype=torch.float32
    )
    save_adapter(add_adapters(wider, ADAPTER), directory / "wider" / "adapter")


@dataclass(frozen=True)
class Refused:
    """A command line that is refused, and what its message must hold."""

    arguments: tuple[str, ...]
    fragments: tuple[str, ...]
    overrides: tuple[str, ...] = ()


def task_override(**task: Any) -> tuple[str, ...]:
    return (f"evaluation.tasks={json.dumps([task])}",)


def own_choices(name: str) -> tuple[str, ...]:
    return task_override(task="multiple_choice", name="sky", path=f"../{name}.jsonl")


BAD: dict[str, Refused] = {
    "unknown task": Refused(
        ("--tasks", "leters"), ("--tasks leters: no task of", "(nearest: letters)", "known are: passkey")
    ),
    "unknown task in the configuration": Refused(
        (), ("evaluation.tasks.0.task:", 'did you mean "passkey"?'), task_override(task="paskey")
    ),
    "own task by its kind": Refused(("--tasks", "generation"), ("needs settings", "evaluation.tasks")),
    "no tasks": Refused((), ("nothing to evaluate", "--tasks"), ("evaluation.tasks=[]",)),
    "setting of another task": Refused(
        (),
        ("evaluation.tasks.0.metrics:", "remove it"),
        task_override(task="passkey", metrics=["f1"]),
    ),
    "length too short": Refused(("--lengths", "32"), ("--lengths 32: allowed: at least 64 tokens",)),
    "length that holds no fact": Refused(("--lengths", "64"), ("passkey: a length of 64", "use at least")),
    "lengths of nothing": Refused(("--tasks", "letters", "--lengths", "256"), ("--lengths: no task is",)),
    "no number": Refused(("--lengths", "long"), ("usage:", "--lengths", "'long'")),
    "nothing to do": Refused(("--no-base",), ("--no-base: leaves nothing", "--adapter")),
    "file missing": Refused(
        (),
        ("evaluation.tasks.0.path:", "../leters.jsonl: no such file (nearest: letters.jsonl)"),
        own_choices("leters"),
    ),
    "string-typed labels": Refused(
        (),
        (
            "records of the task 'sky': none of 1 can be used",
            "string_labels.jsonl:1",
            "'true'",
            "set `labels`",
        ),
        own_choices("string_labels"),
    ),
    "missing field": Refused(
        (), ("missing_field.jsonl:1: the record has no field 'label'",), own_choices("missing_field")
    ),
    "empty choice": Refused(
        (), ("empty_choice.jsonl:1: choice 2 of 2 is empty",), own_choices("empty_choice")
    ),
    # In the second line: the first one could be answered before it is seen.
    "corrupt line": Refused((), ("corrupt.jsonl:2: is not valid JSON",), own_choices("corrupt")),
    "no adapter": Refused(("--adapter", "../nowhere"), ("--adapter ../nowhere: no such directory",)),
    "empty adapter": Refused(
        ("--adapter", "../empty/adapter"), ("empty/adapter/adapter_config.json: missing", "no adapter")
    ),
    "adapter of another base": Refused(
        ("--adapter", "../foreign/adapter"), ("foreign/adapter: was trained on another base model",)
    ),
    "adapter of another size": Refused(
        ("--adapter", "../wider/adapter"), ("wider/adapter: model.layers.0.", "saved for another base model")
    ),
    "output in a file": Refused(("--out", "../letters.jsonl"), ("letters.jsonl", "choose another")),
    "adapter of another base in a dry run": Refused(
        ("--adapter", "../foreign/adapter", "--dry-run"), ("was trained on another base model",)
    ),
}
