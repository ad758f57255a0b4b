"""What a run would do, for `--dry-run`: everything is checked but the weights are not read."""

from __future__ import annotations

import json
from collections.abc import Callable

from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.config.build import (
    build_data,
    build_store,
    build_tokenizer,
    check_model,
    check_tracking,
    meta_model,
)
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import gradient_accumulation_steps
from ssmlora_dist.data import Dataset, ExampleStream
from ssmlora_dist.tokenization import TextEncoder
from ssmlora_dist.tracking import is_installed
from ssmlora_dist.training.contents import pinned, revisions
from ssmlora_dist.training.continuation import Continuation
from ssmlora_dist.training.data import account_lines


def describe(config: RunConfig, world_size: int, warn: Callable[[str], object]) -> str:
    """The resolved configuration and what follows from it, as text; `warn` is told what a run would be.

    Raises:
        SSMLoRAError: whatever would stop the run before the weights are read.
    """
    check_tracking(config, warn)
    check_model(config)
    tokenizer = build_tokenizer(config.model, warn)
    as_of_now = pinned(config, revisions(config, Continuation()))
    train, validation = build_data(as_of_now, tokenizer)
    model = meta_model(config)
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trainable
    training = config.training
    accumulation = gradient_accumulation_steps(config, world_size)
    lines = [
        json.dumps(config.model_dump(mode="json", by_alias=True), indent=2),
        f"parameters   {trainable:,} trained, {frozen:,} frozen",
        f"computes in  {config.model.compute_dtype}",
        f"batch        {training.global_batch_size} = {world_size} ranks x {accumulation} micro-batches x "
        f"{training.micro_batch_size} sequences",
    ]
    is_streamed = isinstance(train, ExampleStream)
    sample = train.sample() if isinstance(train, ExampleStream) else train
    lines += _source_lines("train", sample, is_streamed)
    if (doubt := TextEncoder(tokenizer).doubt(sample.closings)) is not None:
        lines.append(f"warning      {doubt}")
    if validation is not None:
        lines += _source_lines("validation", validation)
    if (store := build_store(config)) is not None:
        lines.append(f"tracking     {store if is_installed() else 'none: MLflow is not installed'}")
    return "\n".join(lines)


def _source_lines(name: str, dataset: Dataset, is_streamed: bool = False) -> list[str]:
    warning = dataset.report.warning()
    warnings = [] if warning is None else [f"warning      data.{name}: {warning}"]
    return account_lines(name, dataset.report, is_streamed) + warnings
