"""What a run would do, for `--dry-run`: everything is checked but the weights are not read."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from ssmlora_dist.config.build import build_data, build_tokenizer, check_model
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import ExampleStream, num_steps_of
from ssmlora_dist.tracking import RunDirectory
from ssmlora_dist.training.continuation import find_continuation
from ssmlora_dist.training.data import account_lines
from ssmlora_dist.training.header import run_header


def describe(
    config: RunConfig, device_type: str, world_size: int, resume: str, warn: Callable[[str], object]
) -> str:
    """The resolved configuration and what follows from it, as text.

    Args:
        config: of the run.
        device_type: where it would compute.
        world_size: number of ranks.
        resume: as for `run.run_training`.
        warn: told of damaged checkpoints.

    Raises:
        SSMLoRAError: whatever would stop the run before the weights are read.
    """
    directory = RunDirectory(config.run.output_dir / config.run.name)
    continuation = find_continuation(resume, directory, warn, claim=False)
    check_model(config)
    train, validation = build_data(config, build_tokenizer(config.model))
    training = config.training
    is_streamed = isinstance(train, ExampleStream)
    sample = train.sample() if isinstance(train, ExampleStream) else train
    accounts = account_lines("train", sample.report, is_streamed=is_streamed)
    if validation is not None:
        accounts += account_lines("validation", validation.report)
    header = run_header(
        config,
        torch.device(device_type),
        world_size,
        num_steps=training.max_steps
        or num_steps_of(training.num_epochs or 1.0, len(sample), training.global_batch_size),
        num_examples=None if is_streamed else len(sample),
        accounts=accounts,
        continuation=continuation,
    )
    return "\n".join([json.dumps(config.model_dump(mode="json", by_alias=True), indent=2), header])
