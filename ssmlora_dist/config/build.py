"""Building what a run needs from the sections of its configuration: here configuration objects stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.files import read_base
from ssmlora_dist.api import add_adapters, load_adapter
from ssmlora_dist.config.schema import ModelSection, RetrievalSection, RunConfig, SourceSection
from ssmlora_dist.data import (
    Dataset,
    ExampleReader,
    ExampleStream,
    Partition,
    generate_dataset,
    read_dataset,
)
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models import (
    base_fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    projection_path,
    require_supported,
)
from ssmlora_dist.models.stage import StageLayers
from ssmlora_dist.tracking import Store, check_store, choose_store

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


def build_store(config: RunConfig) -> Store | None:
    """Where the run is recorded besides its directory; None: nowhere."""
    tracking = config.tracking
    if tracking.tracker == "none":
        return None
    return choose_store(config.run.output_dir, tracking.uri, tracking.experiment)


def check_tracking(config: RunConfig, warn: Callable[[str], object]) -> None:
    """Finds what is wrong with the tracker's store and experiment, before any long work.

    Raises:
        ConfigError: with the remedy.
    """
    if (store := build_store(config)) is not None:
        check_store(store, warn)


def build_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer named in the section, else the model's own."""
    source = section.tokenizer or section.path
    assert source is not None, "refused by config.rules"
    return load_tokenizer(source, section.revision if section.tokenizer is None else None)


def build_model(
    config: RunConfig,
    device: torch.device,
    stage: StageLayers | None = None,
    *,
    on_part: Callable[[nn.Module], None] | None = None,
    swap_rows: Callable[[Tensor, Tensor], None] | None = None,
) -> PreTrainedModel:
    """The frozen backbone on `device`, adapted; all of it, or a pipeline stage.

    `on_part` and `swap_rows` are handed to `load_model`.
    """
    model = build_backbone(config, device, stage, on_part=on_part, swap_rows=swap_rows)
    return add_adapters(model, config.adapter, seed=config.run.seed)


def build_backbone(
    config: RunConfig, device: torch.device, stage: StageLayers | None = None, **load: Any
) -> PreTrainedModel:
    """The frozen backbone alone; `load` is handed to `load_model`."""
    settings = backbone_settings(config)
    settings["compute_dtype"] = getattr(torch, config.model.compute_dtype)
    return load_model(**settings, device=device, stage=stage, **load)


def meta_model(config: RunConfig) -> PreTrainedModel:
    """The whole adapted model without storage, for counting."""
    from transformers import AutoModelForCausalLM

    section = config.model
    model_config = load_config(section.path, config=section.config, revision=section.revision)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(model_config)
        return add_adapters(model, config.adapter)


def backbone_settings(config: RunConfig) -> dict[str, Any]:
    """The keywords of `load_model` in JSON types, kept with the adapter; place and device aside."""
    section = config.model
    return {
        **section.model_dump(include={"path", "init", "config", "revision", "compute_dtype", "attention"}),
        "quantization": config.quantization.mode,
        "double_quantization": config.quantization.double_quantization,
        "seed": config.run.seed,
    }


def build_fingerprint(config: RunConfig) -> str:
    """The backbone's fingerprint, kept with the adapter."""
    return _fingerprint(backbone_settings(config))


def load_trained(
    directory: Path, *, path: str | None = None, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained adapter on its backbone, and the tokenizer.

    Args:
        directory: an adapter directory.
        path: of the base model, where it is not where it was during training.
        device: where the model computes.

    Raises:
        AdapterError: the directory cannot be read or belongs to another base model.
        ModelError: the base model cannot be found or read.
    """
    base = read_base(directory)
    tokenizer = base.pop("tokenizer", None)
    base["path"] = path or base.get("path")
    if base["path"] is None and base.get("config") is None:
        raise AdapterError(f"{directory}: does not record its base model; name it with --model")
    fingerprint = _fingerprint(base)
    dtype = getattr(torch, base.pop("compute_dtype", "bfloat16"))
    model = load_model(**base, compute_dtype=dtype, device=device)
    load_adapter(model, directory, base_fingerprint=fingerprint)
    return model, load_tokenizer(tokenizer or base["path"], None if tokenizer else base.get("revision"))


def _fingerprint(base: Mapping[str, Any]) -> str:
    known = {key: base[key] for key in ("init", "config", "revision", "seed") if key in base}
    return base_fingerprint(base["path"], **known)


def build_data(config: RunConfig, tokenizer: Any) -> tuple[Dataset | ExampleStream, Dataset | None]:
    """Training and validation examples; validation is cut to `evaluation.num_examples`.

    Raises:
        DataError: anything that keeps the data from being used, with file and line; of a stream, in its first
            examples.
    """
    source, validation = config.data.train, config.data.validation
    train: Dataset | ExampleStream
    if source.streaming:
        reader = _reader(config, source, tokenizer, "train")
        train = ExampleStream(reader, source.shuffle_buffer_size, config.run.seed)
    else:
        train = _dataset(config, source, tokenizer, "train")
    return train, _dataset(config, validation, tokenizer, "validation") if validation else None


def _dataset(config: RunConfig, source: SourceSection, tokenizer: Any, partition: Partition) -> Dataset:
    num_examples = config.evaluation.num_examples if partition == "validation" else None
    if source.format == "retrieval":
        settings = (source.retrieval or RetrievalSection()).model_dump()
        settings["num_examples"] = min(settings["num_examples"], num_examples or settings["num_examples"])
        return generate_dataset(
            tokenizer=tokenizer,
            max_length=config.data.max_length,
            partition=partition,
            seed=config.run.seed,
            settings=settings,
        )
    return read_dataset(_reader(config, source, tokenizer, partition, num_examples))


def _reader(
    config: RunConfig, source: SourceSection, tokenizer: Any, partition: Partition, limit: int | None = None
) -> ExampleReader:
    limits = [n for n in (source.limit, limit) if n is not None]
    return ExampleReader(
        **source.model_dump(exclude={"retrieval", "limit", "shuffle_buffer_size"}),
        limit=min(limits) if limits else None,
        tokenizer=tokenizer,
        max_length=config.data.max_length,
        too_long=config.data.too_long,
        partition=partition,
    )
