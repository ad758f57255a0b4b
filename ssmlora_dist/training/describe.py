"""What a run would do, for `--dry-run`: everything is checked but the weights are not read."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from ssmlora_dist.config.build import build_data, build_tokenizer, check_model, check_tracking
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import ExampleStream, num_steps_of
from ssmlora_dist.tokenization import TextEncoder
from ssmlora_dist.tracking import RunDirectory
from ssmlora_dist.training.contents import pinned, revisions
from ssmlora_dist.training.continuation import check_settings, find_continuation
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
        warn: told what a run would be.

    Raises:
        SSMLoRAError: whatever would stop the run before the weights are read.
    """
    directory = RunDirectory(config.run.output_dir / config.run.name)
    continuation = find_continuation(resume, directory, warn, claim=False)
    check_tracking(config, warn)
    check_settings(continuation, config)
    check_model(config)
    tokenizer = build_tokenizer(config.model, warn)
    train, validation = build_data(pinned(config, revisions(config, continuation)), tokenizer)
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
