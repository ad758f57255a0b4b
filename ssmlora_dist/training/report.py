"""What a run reports of itself: rows, tables and tags, and to whom."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import Any

from ssmlora_dist.config.build import build_store
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.evaluation.teacher_forced import OVERALL, Score
from ssmlora_dist.sizes import DecoderShape
from ssmlora_dist.tracking import BeforeAfter, Console, NullTracker, Tracker, check_store, mlflow_tracker
from ssmlora_dist.training.loop import StepRecord
from ssmlora_dist.training.metrics import peak_tflops
from ssmlora_dist.training.resume_point import ResumePoint

Scores = dict[str, Score]


def step_row(
    record: StepRecord, context: DistributedContext, shape: DecoderShape, global_batch_size: int
) -> dict[str, float]:
    """The logged row of a step; with the model FLOP utilisation where the device's peak is known."""
    result, seconds, num_ranks = record.result, record.step_seconds, context.world_size
    row = {
        "loss": result.loss,
        "learning_rate": record.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": result.num_tokens / seconds,
        "tokens_per_second_per_device": result.num_tokens / seconds / num_ranks,
        "target_tokens_per_second": result.num_target_tokens / seconds,
        "padding_share": result.num_padding_tokens / result.num_tokens,
        "step_seconds": seconds,
        "data_seconds": record.data_seconds,
        "skipped_steps": float(record.skipped_steps),
    }
    if result.loss_scale is not None:
        row["loss_scale"] = result.loss_scale
    peak = peak_tflops(context.device)
    if peak is not None:
        length = result.num_tokens / global_batch_size
        achieved = shape.flops_per_token(length) * row["tokens_per_second_per_device"] / 1e12
        row["model_flop_utilization"] = achieved / peak
    return row


def score_row(scores: Scores) -> dict[str, float]:
    """The logged row of an evaluation, with the figures of every length and of all."""
    row = {}
    for length, score in scores.items():
        suffix = "" if length == OVERALL else f"_{length}"
        row[f"validation_loss{suffix}"] = score.loss
        row[f"validation_exact_match{suffix}"] = score.exact_match
    return row


def state_row(after: Scores, without_states: Scores) -> dict[str, float]:
    """The logged row of what the state is worth: by how much the loss is higher without it, in nats."""
    row = {}
    for length, score in without_states.items():
        suffix = "" if length == OVERALL else f"_{length}"
        row[f"validation_loss_without_states{suffix}"] = score.loss
        row[f"state_worth{suffix}"] = score.loss - after[length].loss
    return row


def plain_scores(scores: Scores | None) -> dict[str, Any] | None:
    """In JSON types, which have no number that is not finite."""
    if not scores:
        return None
    return {
        length: {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(score).items()
        }
        for length, score in scores.items()
    }


def scores_from_plain(plain: dict[str, Any] | None) -> Scores | None:
    """The inverse of `plain_scores`."""
    return {length: Score(**score) for length, score in plain.items()} if plain else None


def before_and_after(
    before: Scores, after: Scores, without_states: Scores | None = None
) -> list[BeforeAfter]:
    """The rows of the table that is shown at the end.

    Args:
        before: training.
        after: training.
        without_states: the same as `after`, with every state replaced by its mean.
    """
    rows = [
        BeforeAfter(
            length if length != OVERALL else "all",
            after[length].num_examples,
            score.loss,
            after[length].loss,
            score.exact_match,
            after[length].exact_match,
        )
        for length, score in before.items()
    ]
    if without_states is not None:
        score = without_states[OVERALL]
        rows.append(
            BeforeAfter("states averaged", score.num_examples, None, score.loss, None, score.exact_match)
        )
    return rows


def environment_tags(environment: dict[str, Any]) -> dict[str, str]:
    """Tags of a tracked run, from `tracking.environment_record`."""
    git = environment["git"] or {}
    tags = {f"version.{name}": version for name, version in environment["packages"].items() if version}
    return tags | {f"git.{name}": str(value) for name, value in git.items()}


def tracker_of(
    config: RunConfig, context: DistributedContext, console: Console, resume_point: ResumePoint
) -> Tracker:
    """Rank 0's tracker; none on the other ranks. Every rank calls it.

    It goes on with the run that is continued in place, or else with that in MLflow's own variable
    MLFLOW_RUN_ID, by which whoever starts this process says which run it is.

    Raises:
        ConfigError: nothing can be recorded there.
    """
    store = build_store(config)
    if store is None:
        return NullTracker()
    context.on_main(lambda: check_store(store, console.warn))
    if not context.is_main:
        return NullTracker()
    checkpoint = resume_point.checkpoint if resume_point.in_place else None
    continued = checkpoint.progress["tracker_run_id"] if checkpoint else None
    run_id = continued or os.environ.get("MLFLOW_RUN_ID")
    return mlflow_tracker(store, console.warn, run_id)
