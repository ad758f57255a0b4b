"""Building what a run needs from the sections of its configuration: here configuration objects stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from ssmlora_dist.api import add_adapters
from ssmlora_dist.config.schema import ModelSection, RetrievalSection, RunConfig, SourceSection
from ssmlora_dist.data import Dataset, build_dataset
from ssmlora_dist.models import (
    base_fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    projection_path,
    require_supported,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_model(config: RunConfig) -> None:
    """Finds what is wrong with the backbone's place, family and adapted projections, before it is loaded.

    Raises:
        ModelError: with the remedy.
    """
    section = config.model
    model_config = load_config(section.path, config=section.config, revision=section.revision)
    family = require_supported(model_config.model_type)
    for projection in config.adapter.targets:
        projection_path(family, projection)


def build_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer named in the section, else the model's own."""
    source = section.tokenizer or section.path
    assert source is not None, "refused by config.rules"
    return load_tokenizer(source, section.revision if section.tokenizer is None else None)


def build_model(config: RunConfig, device: torch.device) -> PreTrainedModel:
    """The frozen backbone on `device`, adapted."""
    model = build_backbone(config, device)
    return add_adapters(model, config.adapter, seed=config.run.seed)


def build_backbone(config: RunConfig, device: torch.device) -> PreTrainedModel:
    """The frozen backbone on `device`."""
    section = config.model
    return load_model(
        section.path,
        init=section.init,
        config=section.config,
        revision=section.revision,
        quantization=config.quantization.mode,
        double_quantization=config.quantization.double_quantization,
        compute_dtype=getattr(torch, section.compute_dtype),
        attention=section.attention,
        device=device,
        seed=config.run.seed,
    )


def build_fingerprint(config: RunConfig) -> str:
    """The backbone's fingerprint, kept with the adapter."""
    section = config.model
    return base_fingerprint(
        section.path, init=section.init, config=section.config, revision=section.revision, seed=config.run.seed
    )


def build_data(config: RunConfig, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Training and validation examples; validation is cut to `evaluation.num_examples`."""
    train = _dataset(config, config.data.train, tokenizer, "train", None)
    if config.data.validation is None:
        return train, None
    limit = config.evaluation.num_examples
    return train, _dataset(config, config.data.validation, tokenizer, "validation", limit)


def _dataset(
    config: RunConfig,
    source: SourceSection,
    tokenizer: Any,
    partition: Literal["train", "validation"],
    limit: int | None,
) -> Dataset:
    settings = source.model_dump(exclude={"retrieval", "limit"})
    limits = [n for n in (source.limit, limit) if n is not None]
    return build_dataset(
        **settings,
        retrieval=(source.retrieval or RetrievalSection()).model_dump(),
        limit=min(limits) if limits else None,
        tokenizer=tokenizer,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        partition=partition,
        seed=config.run.seed,
    )
