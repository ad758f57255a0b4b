"""Which checkpoint a run continues from, by what `--resume` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssmlora_dist.config.build import build_fingerprint
from ssmlora_dist.config.resume import resume_problems
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import CheckpointError, ConfigError
from ssmlora_dist.precision import DTypeName
from ssmlora_dist.tracking import RunDirectory
from ssmlora_dist.training.checkpoints import (
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
)

NEVER, AUTO = "never", "auto"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins.

    Attributes:
        checkpoint: what it goes on from; None: from the start.
        path: of the checkpoint.
        in_place: whether the run directory is there already, is claimed, and is written on.
    """

    checkpoint: Checkpoint | None = None
    path: Path | None = None
    in_place: bool = False

    @property
    def step(self) -> int:
        """Steps done."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def compute_dtype(self) -> DTypeName | None:
        """What it was trained in so far; None at the start."""
        return self.checkpoint.config["model"]["compute_dtype"] if self.checkpoint else None


def find_resume_point(
    resume: str, directory: RunDirectory, warn: Callable[[str], object], *, claim: bool = True
) -> ResumePoint:
    """Finds and reads the checkpoint to continue from; on rank 0.

    Args:
        resume: `never`; `auto`, for the newest whole checkpoint in the run's own directory, where there is
            one; or a checkpoint's or a run's directory, the run's own or another one that is continued as a
            new run.
        directory: of this run; claimed if it is written on.
        warn: told of damaged checkpoints.
        claim: whether anything is claimed and made, or everything only looked at.

    Raises:
        CheckpointError: the directory is taken, or nothing can be continued from there.
    """
    source = None if resume in (NEVER, AUTO) else Path(resume)
    if source is not None and not source.is_dir():
        raise CheckpointError(f"--resume {source}: no such directory; name a run or a checkpoint, or auto")
    own = directory.path.resolve()
    in_place = directory.metrics_file.exists() and (
        resume == AUTO or (source is not None and source.resolve().is_relative_to(own))
    )
    if in_place and claim:
        directory.claim(resume=True)
        remove_leftovers(directory.checkpoints)
    elif not in_place:
        RunDirectory.check_free(directory.path, make_parents=claim)
        if source is None:
            return ResumePoint()
    checkpoints = directory.checkpoints if source is None else _checkpoints_of(source)
    if checkpoints is None:
        assert source is not None
        return ResumePoint(read_checkpoint(source), source, in_place)
    found = newest_checkpoint(checkpoints, warn)
    if found is not None:
        return ResumePoint(found[1], found[0], in_place)
    if source is not None:
        raise CheckpointError(f"--resume {source}: holds no checkpoint; name another one, or use never")
    warn(f"{directory.path}: its run had saved no checkpoint yet: it begins anew")
    return ResumePoint(in_place=True)


def settle_places(resume_point: ResumePoint, config: RunConfig) -> RunConfig:
    """Of a run that goes on, the configuration with the checkpoint's places: none are chosen anew."""
    checkpoint = resume_point.checkpoint
    if checkpoint is None or not config.adapter.is_unprobed:
        return config
    if places := checkpoint.config["adapter"].get("places"):
        return config.with_places(tuple(places))
    # Of another placement; what else differs is refused by `check_settings`.
    return config.model_copy(update={"adapter": config.adapter.until_probed})


def check_settings(resume_point: ResumePoint, config: RunConfig) -> None:
    """Checks that the checkpoint is of such a run.

    Raises:
        ConfigError: a setting has changed that may not; a line for each.
    """
    checkpoint = resume_point.checkpoint
    if checkpoint is not None and (problems := resume_problems(checkpoint.config, config)):
        raise ConfigError(problems, source=f"--resume {resume_point.path}")


def completion(resume_point: ResumePoint, directory: RunDirectory, num_steps: int) -> str | None:
    """That nothing is left to do of the run that is to be continued; None where something is. On rank 0.

    Args:
        resume_point: where the run goes on.
        directory: of this run.
        num_steps: of the run, with those that are done.

    Raises:
        ConfigError: it is to end before the step where it stands.
    """
    done = resume_point.step
    if done > num_steps:
        raise ConfigError(
            [
                f"training.max_steps: {num_steps} given or derived; {done} are done in "
                f"{resume_point.path}; raise it, or continue from an earlier checkpoint"
            ]
        )
    if done < num_steps or not resume_point.in_place or not directory.summary_file.exists():
        return None
    return f"{directory.path}: complete, all {done} steps are done; raise training.max_steps to train on"


def base_of(config: RunConfig, resume_point: ResumePoint) -> str:
    """The base model's fingerprint, which must be that of the checkpoint.

    Raises:
        CheckpointError: it is another one.
    """
    fingerprint, checkpoint = build_fingerprint(config), resume_point.checkpoint
    if checkpoint is not None and checkpoint.base_fingerprint != fingerprint:
        raise CheckpointError(
            f"{resume_point.path}: was trained on another base model (fingerprint "
            f"{checkpoint.base_fingerprint}) than that of model.path (fingerprint {fingerprint}); name the "
            "one it was trained on"
        )
    return fingerprint


def _checkpoints_of(source: Path) -> Path | None:
    """The directory of checkpoints in a run, or itself; None for a checkpoint."""
    inside = RunDirectory(source).checkpoints
    if inside.is_dir():
        return inside
    return source if source.name == inside.name else None
