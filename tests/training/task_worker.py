"""Training with tasks and without, over forked ranks: `python -m tests.training.task_worker RESULTS`."""

from __future__ import annotations

import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

from ..launch.forking import run_side_by_side
from ..launch.preloaded import hide_plots
from ..launch.processes import DEBUG_TINY, TRAIN_SCRIPT, rank_variables

NUM_STEPS, EVERY_STEPS = 5, 2
ALONE, SHARDED, BROKEN = "alone", "sharded", "broken"
# Of what the model takes, 512 tokens, and of more.
LENGTHS = (256, 600)
NUM_EXAMPLES = 3
TASKS = [
    {"task": "passkey", "lengths": LENGTHS, "depths": [0, 1], "num_examples": NUM_EXAMPLES},
    {"task": "multiple_choice", "name": "colours", "path": "../colours.jsonl"},
]
COLOURS = [{"question": f"Colour {i}?", "choices": ["red", "blue"], "label": i % 2} for i in range(5)]
COMMON = (
    "run.name=run",
    "run.output_dir=.",
    "model.config.num_hidden_layers=2",
    # So that random numbers are drawn in every step.
    "adapter.dropout=0.2",
    "data.train.task.num_examples=16",
    "data.validation=null",
    "evaluation.every_steps=null",
    f"training.max_steps={NUM_STEPS}",
    "training.global_batch_size=4",
    "checkpoint.every_steps=null",
    "tracking.tracker=none",
)
WITH_TASKS = (
    f"evaluation.tasks={json.dumps(TASKS)}",
    f"evaluation.tasks_every_steps={EVERY_STEPS}",
    "evaluation.max_batch_tokens=700",
)
BROKEN_TASKS = (
    'evaluation.tasks=[{"task":"multiple_choice","path":"../broken.jsonl"}]',
    "evaluation.tasks_every_steps=1",
)
# Name -> ranks, overrides.
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    ALONE: (1, ()),
    f"{ALONE} with tasks": (1, WITH_TASKS),
    SHARDED: (2, ("parallel.zero_stage=2",)),
    f"{SHARDED} with tasks": (2, ("parallel.zero_stage=2", *WITH_TASKS)),
    BROKEN: (1, BROKEN_TASKS),
}


def rank_of(name: str, variables: dict[str, str]) -> int:
    """One rank of a run; its exit code."""
    _, overrides = RUNS[name]
    os.environ.update(variables)
    sys.argv = [str(TRAIN_SCRIPT), "--config", str(DEBUG_TINY), "--set", *COMMON, *overrides]
    runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")
    return 0


def main() -> None:
    hide_plots()
    runs = {
        name: [partial(rank_of, name, variables) for variables in rank_variables(num_ranks)]
        for name, (num_ranks, _) in RUNS.items()
    }
    Path(sys.argv[1]).write_text(json.dumps(run_side_by_side(runs, Path.cwd(), num_at_once=2)))


if __name__ == "__main__":
    main()
