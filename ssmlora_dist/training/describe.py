"""What a run would do, for `--dry-run`: everything is checked but the weights are not read."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from ssmlora_dist.config.build import build_data, check_model, check_tracking, row_tokens
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import Dataset, ExampleStream, num_steps_of, rows_of_epoch
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.tokenization import TextEncoder
from ssmlora_dist.tracking import RunDirectory
from ssmlora_dist.training.compute_dtype import choose_compute_dtype
from ssmlora_dist.training.contents import (
    check_train,
    first_start,
    pinned,
    revisions,
    same_validation,
    tokenizer_of,
    train_contents,
)
from ssmlora_dist.training.data import account_lines
from ssmlora_dist.training.header import run_header
from ssmlora_dist.training.metrics import usable_memory_bytes
from ssmlora_dist.training.planner import settle_memory
from ssmlora_dist.training.resume_point import (
    ResumePoint,
    base_of,
    check_settings,
    completion,
    find_resume_point,
    settle_places,
)


def describe(
    config: RunConfig, device_type: str, world_size: int, resume: str, warn: Callable[[str], object]
) -> str:
    """The resolved configuration and what follows from it, as text.

    Args:
        config: of the run.
        device_type: where it would compute.
        world_size: number of ranks.
        resume: as for `run.run_training`.
        warn: told what a run would be.

    Raises:
        SSMLoRAError: whatever would stop the run before the weights are read.
    """
    directory = RunDirectory(config.run.output_dir / config.run.name)
    resume_point = find_resume_point(resume, directory, warn, claim=False)
    chosen = []
    if config.model.compute_dtype == "auto":
        choices, kept = [machine_dtype(device_type)], resume_point.compute_dtype
        config, line = choose_compute_dtype(config, choices, device_type, world_size, kept=kept)
        chosen.append(line)
    check_tracking(config, warn)
    config = settle_places(resume_point, config)
    check_settings(resume_point, config)
    check_model(config, device_type)
    if config.training.is_unsettled:
        config, line = settle_memory(config, world_size, usable_memory_bytes(torch.device(device_type)))
        chosen.append(line)
    tokenizer, _ = tokenizer_of(config, resume_point, first_start(resume_point), warn)
    train, validation = build_data(pinned(config, revisions(config, resume_point)), tokenizer, warn)
    _compare(config, resume_point, train, validation, warn)
    training = config.training
    is_streamed = isinstance(train, ExampleStream)
    sample = train.sample() if isinstance(train, ExampleStream) else train
    if (doubt := TextEncoder(tokenizer).doubt(sample.closings)) is not None:
        warn(doubt)
    reports = {"train": sample.report} | ({"validation": validation.report} if validation else {})
    accounts = []
    for name, report in reports.items():
        accounts += account_lines(name, report, is_streamed=is_streamed and name == "train")
        if (warning := report.warning()) is not None:
            warn(f"data.{name}: {warning}")
    num_rows = None if is_streamed else len(rows_of_epoch(sample, config.run.seed, 0, row_tokens(config)))
    num_steps = training.max_steps or num_steps_of(
        training.num_epochs or 1.0, num_rows or 0, training.global_batch_size
    )
    resolved = json.dumps(config.model_dump(mode="json", by_alias=True), indent=2)
    if (complete := completion(resume_point, directory, num_steps)) is not None:
        return "\n".join([resolved, complete])
    header = run_header(
        config,
        torch.device(device_type),
        world_size,
        num_steps=num_steps,
        num_examples=None if is_streamed else len(sample),
        num_rows=num_rows,
        accounts=accounts,
        resume_point=resume_point,
    )
    return "\n".join([resolved, *chosen, header])


def _compare(
    config: RunConfig,
    resume_point: ResumePoint,
    train: Dataset | ExampleStream,
    validation: Dataset | None,
    warn: Callable[[str], object],
) -> None:
    """Checks that data and base model are those of the checkpoint that is continued, if any.

    Raises:
        SSMLoRAError: they are not.
    """
    if (checkpoint := resume_point.checkpoint) is None:
        return
    if isinstance(train, ExampleStream):
        train.check(checkpoint.progress["data_position"])
    else:
        check_train(resume_point, train_contents(train), config.data.train.task is not None)
    same_validation(resume_point, validation.sha256 if validation else None, warn)
    base_of(config, resume_point)
