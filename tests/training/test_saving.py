"""When a run saves, and what it puts into a checkpoint; an engine and a context that only report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.loss_scale import LossScale
from ssmlora_dist.distributed.optimizer_state import OptimizerState
from ssmlora_dist.training.checkpoints import complete_checkpoints, read_checkpoint
from ssmlora_dist.training.resume_point import ResumePoint
from ssmlora_dist.training.saving import Saver

from .checkpoint_cases import ADAPTER, BASE, checkpoint, same

STEP = 10


class RecordingContext:
    """A process without others, which writes down what it is told to note."""

    def __init__(self, rank: int = 0) -> None:
        self.is_main = rank == 0
        self.noted: list[str] = []

    def on_main(self, action: Callable[[], Any]) -> Any:
        return action()

    def note_checkpoint(self, path: str) -> None:
        self.noted.append(path)


def run_config(**section: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "run"},
            "model": {"path": "org/base"},
            "adapter": ADAPTER.model_dump(mode="json"),
            "data": {"train": {"format": "task", "task": {"task": "passkey"}}},
            "training": {"max_steps": 100, "global_batch_size": 6},
            "checkpoint": {"every_steps": 4, **section},
        }
    )


def saver(
    directory: Path,
    context: RecordingContext | None = None,
    resume_point: ResumePoint | None = None,
    warnings: list[str] | None = None,
    **section: Any,
) -> Saver:
    whole = checkpoint(STEP)
    engine: Any = SimpleNamespace(
        adapter_tensors=lambda: whole.parameters,
        optimizer_state=lambda: OptimizerState(STEP - 1, whole.moments),
        loss_scale=LossScale(1024.0, 7),
    )
    told: list[str] = [] if warnings is None else warnings
    return Saver(
        run_config(**section),
        context or RecordingContext(),  # type: ignore[arg-type]
        engine,
        directory,
        BASE,
        "f00d" * 16,
        whole.contents,
        resume_point or ResumePoint(),
        told.append,
    )


def test_it_is_due_every_so_many_steps_and_at_the_best_loss(tmp_path: Path) -> None:
    saving = saver(tmp_path)
    assert [step for step in range(1, 13) if saving.is_due(step)] == [4, 8, 12]
    assert saving.is_due(5, validation_loss=2.0)
    saving.save(5, {}, validation_loss=2.0)
    assert saving.best_validation_loss == 2.0
    assert not saving.is_due(6, validation_loss=2.0)
    assert saving.is_due(6, validation_loss=1.9)
    saving.save(8, {}, validation_loss=2.5)
    assert saving.best_validation_loss == 2.0
    assert saving.last_step == 8
    saving.finish()


@pytest.mark.parametrize("loss", [math.nan, math.inf, None])
def test_a_loss_that_is_no_number_is_never_the_best(tmp_path: Path, loss: float | None) -> None:
    assert not saver(tmp_path).is_best(loss)


def test_what_is_not_asked_for_is_not_due(tmp_path: Path) -> None:
    assert not saver(tmp_path, keep_best=False).is_due(5, validation_loss=1.0)
    only_when_stopped = saver(tmp_path, every_steps=None)
    assert not any(only_when_stopped.is_due(step, validation_loss=1.0) for step in range(1, 13))


def test_a_checkpoint_holds_all_that_a_run_needs(tmp_path: Path) -> None:
    context = RecordingContext()
    saving = saver(tmp_path / "checkpoints", context)
    assert saving.finish() == "no checkpoint has been saved"
    saving.save(STEP, {"totals": {"num_steps": STEP}, "wall_seconds": 1.5}, validation_loss=2.0)
    [path] = complete_checkpoints(tmp_path / "checkpoints") if saving.finish() else []
    assert saving.finish() == saving.last_good() == f"the last good checkpoint is {path}"
    assert context.noted == [str(path)]
    expected = replace(
        checkpoint(STEP),
        progress={
            "totals": {"num_steps": STEP},
            "wall_seconds": 1.5,
            "num_updates": STEP - 1,
            "loss_scale": {"value": 1024.0, "steady_steps": 7},
            "samples_consumed": STEP * 6,
            "best_validation_loss": 2.0,
        },
        config=run_config().model_dump(mode="json", by_alias=True),
        validation_loss=2.0,
    )
    assert same(read_checkpoint(path), expected)


def test_rank_0_alone_writes(tmp_path: Path) -> None:
    saving = saver(tmp_path / "checkpoints", RecordingContext(1))
    saving.save(4, {}, validation_loss=2.0)
    saving.finish()
    assert (saving.last_step, saving.best_validation_loss) == (4, 2.0)
    assert not (tmp_path / "checkpoints").exists()


def test_a_continued_run_knows_what_was_best_and_where_it_came_from(tmp_path: Path) -> None:
    before = checkpoint(8, progress={"best_validation_loss": 1.5})
    context, path = RecordingContext(), tmp_path / "step-00000008"
    saving = saver(tmp_path, context, ResumePoint(before, path, in_place=True))
    assert (saving.last_step, saving.best_validation_loss) == (8, 1.5)
    assert not saving.is_best(1.5)
    assert context.noted == [str(path)]
    assert saving.finish() == f"the last good checkpoint is {path}"


def test_a_save_that_fails_is_told_of_and_the_one_before_stays_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    saving = saver(tmp_path, warnings=warnings)
    saving.save(4, {})
    first = saving.finish()
    saving.save(8, {"not in JSON": object()})
    assert saving.finish() == first
    assert len(warnings) == 1
    assert warnings[0].startswith("checkpoint of step 8: ")
