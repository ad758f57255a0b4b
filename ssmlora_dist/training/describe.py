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
from ssmlora_dist.tracking import is_installed


def describe(config: RunConfig, world_size: int, warn: Callable[[str], object]) -> str:
    """The resolved configuration and what follows from it, as text; `warn` is told what a run would be.

    Raises:
        SSMLoRAError: whatever would stop the run before the weights are read.
    """
    check_tracking(config, warn)
    check_model(config)
    train, validation = build_data(config, build_tokenizer(config.model, warn))
    model = meta_model(config)
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trainable
    training = config.training
    accumulation = gradient_accumulation_steps(config, world_size)
    lines = [
        json.dumps(config.model_dump(mode="json", by_alias=True), indent=2),
        f"parameters   {trainable:,} trained, {frozen:,} frozen",
        f"batch        {training.global_batch_size} = {world_size} ranks x {accumulation} micro-batches x "
        f"{training.micro_batch_size} sequences",
        f"train        {_data_line(train)}",
    ]
    if validation is not None:
        lines.append(f"validation   {_data_line(validation)}")
    if (store := build_store(config)) is not None:
        lines.append(f"tracking     {store if is_installed() else 'none: MLflow is not installed'}")
    return "\n".join(lines)


def _data_line(dataset: Dataset | ExampleStream) -> str:
    if isinstance(dataset, ExampleStream):
        return f"streamed; of the first rows: {_data_line(dataset.sample())}"
    report = dataset.report
    return (
        f"{report.num_examples} examples of {report.num_rows} rows; {report.num_dropped_too_long} dropped as "
        f"too long, {report.num_truncated} truncated, {report.num_without_target} without target"
    )
