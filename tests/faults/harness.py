"""Real runs over forked ranks, each started again and again, and killed at chosen or random moments."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..launch.forking import Ranks
from ..launch.processes import DEBUG_TINY, TRAIN_SCRIPT, rank_variables
from . import moments

NUM_STEPS, SAVE_EVERY = 12, 3
RUN_NAME = "run"
# To the other ranks of a killed one, which notice it by themselves in a moment, but for those that are still
# waiting for it to come at all: these a launcher ends.
PATIENCE_SECONDS = 20.0
COMMON = (
    f"run.name={RUN_NAME}",
    "run.output_dir=..",
    "model.config.num_hidden_layers=4",
    "data.train.task.num_examples=32",
    f"training.max_steps={NUM_STEPS}",
    "training.global_batch_size=4",
    f"checkpoint.every_steps={SAVE_EVERY}",
    "evaluation.every_steps=5",
    "data.validation.task.num_examples=1",
    "tracking.tracker=none",
)
# Name -> ranks, overrides.
ALONE = "one rank"
TOPOLOGIES: dict[str, tuple[int, tuple[str, ...]]] = {
    ALONE: (1, ()),
    **{f"ZeRO {stage}": (2, (f"parallel.zero_stage={stage}",)) for stage in range(4)},
    "two stages": (2, ("parallel.pipeline_stages=2",)),
}

Moment = tuple[str, int, Callable[[], object]]


@dataclass(frozen=True)
class Life:
    """One start of a run.

    Attributes:
        topology: a name in `TOPOLOGIES`.
        overrides: beside those.
        resume: as on the command line.
        moments: by rank, arguments of `moments.at`.
        killed: a rank, and how many seconds after the start it is killed from outside.
    """

    topology: str
    overrides: tuple[str, ...] = ()
    resume: str = "auto"
    moments: Mapping[int, Sequence[Moment]] = field(default_factory=dict)
    killed: tuple[int, float] | None = None


Found = list[dict[str, Any]]
Story = Generator[Life, Found, Any]
"""Lives of one run: is told what its ranks left, and returns what is to be known of it all."""


def play(stories: Mapping[str, Story], directory: Path, num_at_once: int) -> dict[str, Any]:
    """Plays stories, of so many one life each at a time; what each of them returns, by name.

    The run of a story lies in `directory`/NAME/`RUN_NAME`, with blanks as `_`, what its ranks said beside it.
    """
    waiting, told = list(stories), {}
    playing: dict[str, _Playing] = {}
    while waiting or playing:
        while waiting and len(playing) < num_at_once:
            name = waiting.pop(0)
            playing[name] = _Playing(stories[name], directory / name.replace(" ", "_"))
        for name in list(playing):
            if playing[name].is_over():
                told[name] = playing.pop(name).outcome
        time.sleep(0.01)
    return told


class _Playing:
    """A story, at one of its lives."""

    def __init__(self, story: Story, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._story, self._directory = story, directory
        self._num_lives = 0
        self.outcome: Any = None
        self._ranks: Ranks
        self._life: Life
        self._killed, self._began = False, 0.0
        self._ended = not self._goes_on(None)

    def is_over(self) -> bool:
        if self._ended:
            return True
        if self._life.killed is not None and not self._killed:
            rank, seconds = self._life.killed
            if time.monotonic() - self._began >= seconds:
                self._killed = True
                self._ranks.kill(rank)
        if not self._ranks.poll():
            ended_at = self._ranks.first_ended_at
            if ended_at is not None and time.monotonic() - ended_at > PATIENCE_SECONDS:
                for rank in range(TOPOLOGIES[self._life.topology][0]):
                    self._ranks.kill(rank)
            return False
        self._ended = not self._goes_on(self._ranks.found())
        return self._ended

    def _goes_on(self, found: Any) -> bool:
        """Tells the story what its last life left, and begins the next one if there is one."""
        try:
            life = self._story.send(found)
        except StopIteration as end:
            self.outcome = end.value
            return False
        variables = rank_variables(TOPOLOGIES[life.topology][0])
        self._num_lives += 1
        self._life, self._killed, self._began = life, False, time.monotonic()
        actions = [partial(_rank_of, life, rank, own) for rank, own in enumerate(variables)]
        self._ranks = Ranks(actions, self._directory / f"life-{self._num_lives:03d}")
        return True


def _rank_of(life: Life, rank: int, variables: Mapping[str, str]) -> int:
    """One rank of a life, as the command line would run it; its exit code."""
    os.environ.update(variables)
    for place, number, action in life.moments.get(rank, ()):
        moments.at(place, number, action)
    overrides = (*COMMON, *TOPOLOGIES[life.topology][1], *life.overrides)
    sys.argv = [str(TRAIN_SCRIPT), "--config", str(DEBUG_TINY), "--resume", life.resume, "--set", *overrides]
    runpy.run_path(str(TRAIN_SCRIPT), run_name="__main__")
    return 0


def adapter(run: Path) -> bytes:
    """The adapter that a run ended with, as it lies on the disk."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def loss_lines(run: Path) -> list[str]:
    """The lines of metrics.jsonl that tell of a training step, as they lie there: with the time it took."""
    file = run / "metrics.jsonl"
    return [line for line in file.read_text().splitlines() if '"loss"' in line] if file.exists() else []


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every line of `loss_lines`."""
    rows = [json.loads(line) for line in loss_lines(run)]
    return [(row["step"], row["loss"]) for row in rows]


def newest_step(run: Path) -> int:
    """Of the newest checkpoint that has its name; 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")), default=0)


def is_inside_save(run: Path) -> bool:
    """Whether what is on the disk shows that the run ended while a checkpoint was written or deleted."""
    directory = run / "checkpoints"
    if not directory.is_dir():
        return False
    names = [path.name for path in directory.iterdir()]
    if any(name.startswith(".") for name in names):
        return True
    latest = directory / "latest"
    named = latest.read_text().strip() if latest.exists() else None
    # The newest has its name, and is not the latest yet.
    return named != max((name for name in names if name.startswith("step-")), default=None)
