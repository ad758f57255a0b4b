"""Building what a run needs from the sections of its configuration: here configuration objects stop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.files import SETTINGS_FILE, read_base, read_config
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.probe import candidate_places
from ssmlora_dist.adapters.projections import resolve
from ssmlora_dist.adapters.tiling import untiled_layers
from ssmlora_dist.api import add_adapters, load_adapter
from ssmlora_dist.config.schema import ModelSection, RunConfig, SourceSection
from ssmlora_dist.config.shown import shown
from ssmlora_dist.config.tasks import task_contents, task_rows
from ssmlora_dist.data import (
    Dataset,
    ExampleReader,
    ExampleStream,
    Partition,
    RowReader,
    default_directory,
    open_prepared,
    prepare,
)
from ssmlora_dist.data.contents import RecordsDigest, source_digest
from ssmlora_dist.data.sources import find_files, read_records
from ssmlora_dist.errors import AdapterError, ConfigError
from ssmlora_dist.models import (
    base_fingerprint,
    decoder_layers,
    empty_model,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    stored_dtype,
    structure_of,
    tokenizer_digests,
)
from ssmlora_dist.models.attention import packing_obstacle
from ssmlora_dist.models.configuration import ROPE, reaching_factor
from ssmlora_dist.models.loading import Attention, attention_implementation
from ssmlora_dist.models.location import locate_base
from ssmlora_dist.models.stage import StageLayers
from ssmlora_dist.models.structure import check_layers, model_class, modules_named
from ssmlora_dist.ops.registry import import_forms
from ssmlora_dist.rope import read_rope
from ssmlora_dist.tokenization import end_token_ids
from ssmlora_dist.tracking import Store, check_store, choose_store

ENDINGS = ("end_token_ids", "stop_texts")
"""What is recorded with an adapter beside how to load its base model, see `TextEncoder.endings`."""

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def check_model(config: RunConfig, device_type: str = "cpu", *, for_training: bool = True) -> None:
    """Finds what is wrong with the backbone's place, structure and adapted projections, before it is loaded.

    Args:
        config: of the run.
        device_type: where it computes.
        for_training: whether rows of `data` are going to be read by it.

    Raises:
        ModelError: with the remedy.
        AdapterError: a projection that the backbone has not, with the nearest.
        ConfigError: rows may be longer than the backbone's positions, or are packed and its attention cannot
            keep their samples apart; or several stages hold a module that is trained whole; or no
            decoder layer has an MLP to tile.
    """
    model_config = shapes_of(config.model)
    limit = max_positions(model_config)
    if for_training and limit is not None and config.data.max_length > limit:
        raise ConfigError(
            [
                f"data.max_length: {config.data.max_length} given; allowed: at most {limit}, for which the "
                f"model's positions are made; lower it{_reaching(config, model_config)}"
            ]
        )
    if for_training and (problems := row_problems(config, model_config, device_type)):
        raise ConfigError(problems)
    model = empty_model(model_config, dtype=torch.bfloat16)
    structure = structure_of(model)
    check_layers(model)
    resolve(config.adapter.until_probed, structure.layers, structure.linears)
    saved = modules_named(structure, config.adapter.modules_to_save)
    shared = [path for path in saved if f"{path}.".startswith(tuple(f"{p}." for p in structure.everywhere))]
    if for_training and shared and (stages := config.parallel.pipeline_stages) > 1:
        raise ConfigError(
            [
                f"adapter.modules_to_save: {shared[0]} given with {stages} pipeline stages, each of which "
                f"would train a copy in {model_config.model_type} models; leave it out, or set "
                "parallel.pipeline_stages to 1"
            ]
        )
    tile_size, layers = config.training.mlp_tile_size, decoder_layers(model)
    if for_training and tile_size not in (None, "auto") and len(untiled_layers(layers)) == len(layers):
        raise ConfigError(
            [
                f"training.mlp_tile_size: {tile_size} given; allowed: null, as no decoder layer of this "
                f"{model_config.model_type} model has an MLP that is a module of its own, without experts; "
                "set it to null"
            ]
        )
    if for_training and config.adapter.is_unprobed:
        sizes = candidate_places(config.adapter, decoder_layers(model), structure.linears)
        least, place = min((size, place) for place, (_, size) in sizes.items())
        if (budget := probe_budget(config)) < least:
            raise AdapterError(
                f"adapter: `probe_parameters` {budget} given or derived; the smallest adapter, in {place}, "
                f"has {least}; raise it"
            )


def row_problems(config: RunConfig, model_config: PreTrainedConfig, device_type: str) -> list[str]:
    """What keeps rows from being packed, or shared among ranks."""
    ranks = config.parallel.sequence_parallel
    if not config.data.packing and ranks == 1:
        return []
    device, dtype = torch.device(device_type), getattr(torch, config.model.compute_dtype)
    attention = attention_implementation(attention_of(config, model_config), model_config, device, dtype)
    problems = []
    if (obstacle := packing_obstacle(model_config, attention)) is not None:
        if config.data.packing:
            problems.append(
                f"data.packing: true given; {model_config.model_type} models cannot keep packed samples "
                f"apart: {obstacle}; set it to false"
            )
        if ranks > 1:
            problems.append(
                f"parallel.sequence_parallel: {ranks} given; {model_config.model_type} models cannot work on "
                f"parts of rows: {obstacle}; set it to 1"
            )
    if ranks == 1:
        return problems
    text_config = model_config.get_text_config()
    heads: int = text_config.num_attention_heads
    key_heads: int = getattr(text_config, "num_key_value_heads", None) or heads
    if heads % ranks or (key_heads % ranks and ranks % key_heads):
        fitting = [n for n in range(2, heads + 1) if not heads % n and not (key_heads % n and n % key_heads)]
        allowed = f"1 or {', '.join(map(str, fitting))}" if fitting else "1"
        problems.append(
            f"parallel.sequence_parallel: {ranks} given; allowed: {allowed}, among which the model's {heads} "
            f"attention heads and {key_heads} key-value heads can be shared out; change it"
        )
    if attention == "flash_attention_2":
        problems.append(
            f"parallel.sequence_parallel: {ranks} given with flash_attention_2; allowed: 1 with it; set "
            'model.attention to "auto", which is sdpa then and needs no mask either'
        )
    return problems


def _reaching(config: RunConfig, model_config: PreTrainedConfig) -> str:
    """The RoPE setting that reaches the longest rows, as another remedy."""
    factor = reaching_factor(model_config, config.data.max_length)
    if factor is None:
        return ""
    if config.model.rope_parameters is not None:
        return f", or set model.rope_parameters.factor to {factor}"
    return f', or set model.rope_parameters to {{"rope_type": "yarn", "factor": {factor}}}'


def probe_budget(config: RunConfig) -> int:
    """The parameters that a probe may spend, of a run whose places are still to be chosen."""
    if config.adapter.probe_parameters is not None:
        return config.adapter.probe_parameters
    alone = config.adapter.model_copy(update={"modules_to_save": ()})
    model = meta_model(config.model_copy(update={"adapter": alone}))
    return sum(parameter.numel() for parameter in adapter_parameters(model).values())


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


def shapes_of(section: ModelSection) -> PreTrainedConfig:
    """The configuration of the backbone, without its weights."""
    return load_config(
        section.path,
        config=section.config,
        revision=section.revision,
        rope_parameters=_given_rope(section),
    )


def _given_rope(section: ModelSection) -> dict[str, Any] | None:
    return None if section.rope_parameters is None else section.rope_parameters.given


def build_tokenizer(section: ModelSection, warn: Callable[[str], object]) -> PreTrainedTokenizerBase:
    """The tokenizer named in the section, else the model's own; `warn` is told what was replaced in it."""
    source = section.tokenizer or section.path
    assert source is not None, "refused by config.rules"
    revision = section.revision if section.tokenizer is None else None
    return load_tokenizer(
        source, revision, num_embeddings=shapes_of(section).get_text_config().vocab_size, warn=warn
    )


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
    settings["attention"] = attention_of(config, shapes_of(config.model))
    return load_model(**settings, device=device, stage=stage, **load)


def attention_of(config: RunConfig, model_config: PreTrainedConfig) -> Attention:
    """`model.attention`; `auto` without flash-attention where ranks share rows, which it takes whole."""
    if config.model.attention != "auto" or config.parallel.sequence_parallel == 1:
        return config.model.attention
    return "sdpa" if model_class(model_config)._supports_sdpa else "eager"


def meta_model(config: RunConfig) -> PreTrainedModel:
    """The whole adapted model without storage, for counting; before a probe, as is configured."""
    model = empty_model(shapes_of(config.model))
    with torch.device("meta"):
        return add_adapters(model, config.adapter.until_probed)


def backbone_settings(config: RunConfig) -> dict[str, Any]:
    """The keywords of `load_model` in JSON types, kept with the adapter; place and device aside."""
    section = config.model
    return {
        **section.model_dump(include={"path", "init", "config", "revision", "compute_dtype", "attention"}),
        ROPE: _given_rope(section),
        "quantization": config.quantization.mode,
        "double_quantization": config.quantization.double_quantization,
        "seed": config.run.seed,
    }


def with_recorded_rope(config: RunConfig, directory: Path) -> RunConfig:
    """The configuration with the RoPE that an adapter was trained with; its own where none is recorded.

    Raises:
        AdapterError: the configuration has another, or the adapter cannot be read.
    """
    base, given = read_base(directory), _given_rope(config.model)
    if ROPE not in base or base[ROPE] == given:
        return config
    if given is not None:
        raise AdapterError(
            f"model.rope_parameters: {shown(given)} given; {directory} was trained with "
            f"{shown(base[ROPE])}; remove it, and that of the adapter is taken"
        )
    return config.with_rope(read_rope(base[ROPE], f"{directory / SETTINGS_FILE}: base.{ROPE}"))


def build_fingerprint(config: RunConfig) -> str:
    """The backbone's fingerprint, kept with the adapter."""
    return _fingerprint(backbone_settings(config))


def load_trained(
    directory: Path,
    *,
    path: str | None = None,
    quantization: str | None = None,
    dtype: str | None = None,
    form_module: str | None = None,
    device: torch.device | str = "cpu",
    warn: Callable[[str], object] = warnings.warn,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained adapter on its backbone, and the tokenizer.

    Args:
        directory: an adapter directory.
        path: of the base model, where it is not where it was during training.
        quantization: of the base model; by default what the adapter was trained on, or none.
        dtype: of the base model; by default what the adapter was trained on, or that of the stored weights.
        form_module: registers the adapter's form of the state; imported first.
        device: where the model computes.
        warn: told what was not recorded.

    Raises:
        AdapterError: the directory cannot be read or belongs to another base model.
        ModelError: the base model cannot be found or read.
    """
    if form_module is not None:
        import_forms(form_module)
    base = read_base(directory)
    # Refused before the base model is loaded.
    read_config(directory)
    endings = {key: base.pop(key, None) for key in ENDINGS}
    tokenizer = base.pop("tokenizer", None)
    located = locate_base(directory, base, path, weights=base.get("init") != "random")
    if located is not None:
        base |= {"path": str(located), "config": None}
    elif base.get("config") is None:
        raise AdapterError(f"{directory}: does not record its base model; name it with --model")
    model_config = load_config(base.get("path"), config=base.get("config"))
    base |= _precision(directory, base, model_config, quantization, dtype, warn)
    vocabulary = load_tokenizer(
        tokenizer or base["path"],
        num_embeddings=model_config.get_text_config().vocab_size,
        where=f"{directory / SETTINGS_FILE}: base.tokenizer" if tokenizer else "--model",
        warn=warn,
    )
    fingerprint = _fingerprint(base)
    model = load_model(**{**base, "compute_dtype": getattr(torch, base["compute_dtype"])}, device=device)
    load_adapter(model, directory, base_fingerprint=fingerprint)
    set_endings(model, vocabulary, endings)
    return model, vocabulary


def _precision(
    directory: Path,
    base: Mapping[str, Any],
    model_config: PreTrainedConfig,
    quantization: str | None,
    dtype: str | None,
    warn: Callable[[str], object],
) -> dict[str, str]:
    """What to load a base model in: what was asked for, else recorded, else its full precision."""
    quantization, dtype = quantization or base.get("quantization"), dtype or base.get("compute_dtype")
    if quantization and dtype:
        return {"quantization": quantization, "compute_dtype": dtype}
    if base.get("init") == "random":
        stored = model_config.dtype or torch.float32
    else:
        stored = stored_dtype(Path(base["path"]), model_config)
    full = {
        "quantization": quantization or "none",
        "compute_dtype": dtype or str(stored).removeprefix("torch."),
    }
    warn(
        f"{directory}: does not record in what precision its base model was trained on; it is loaded with "
        f"quantization {full['quantization']} and dtype {full['compute_dtype']}; name others with "
        "--quantization and --dtype"
    )
    return full


def set_endings(model: PreTrainedModel, tokenizer: Any, endings: Mapping[str, Any]) -> None:
    """Has a model answer greedily, unless asked otherwise, and end where its answers end.

    What else its generation configuration holds (penalties, temperatures, beams) is set aside.

    Args:
        model: with an adapter.
        tokenizer: of the model.
        endings: recorded with the adapter, see `TextEncoder.endings`.
    """
    from transformers import GenerationConfig

    configured = model.generation_config
    own_texts = configured.stop_strings or []
    stop_texts = {
        *([own_texts] if isinstance(own_texts, str) else own_texts),
        *(endings.get("stop_texts") or []),
    }
    ends = end_token_ids(tokenizer.eos_token_id, configured.eos_token_id, endings.get("end_token_ids"))
    model.generation_config = GenerationConfig(
        bos_token_id=configured.bos_token_id,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=sorted(stop_texts) or None,
    )


def _fingerprint(base: Mapping[str, Any]) -> str:
    known = {key: base[key] for key in ("init", "config", "revision", "seed") if key in base}
    return base_fingerprint(base.get("path"), **known)


def build_data(
    config: RunConfig,
    tokenizer: Any,
    warn: Callable[[str], object],
    on_each_node: Callable[[Callable[[], Any]], Any] = lambda action: action(),
) -> tuple[Dataset | ExampleStream, Dataset | None]:
    """Training and validation examples, which lie on the disk unless they are streamed.

    Args:
        config: of the run, with the commits of its data sets.
        tokenizer: of the model.
        warn: told of a source that has changed since it was last prepared.
        on_each_node: runs a function on one rank of every node and gives all of its ranks the result.

    Raises:
        DataError: anything that keeps the data from being used, with file and line; of a stream, in its first
            examples.
    """
    source, validation = config.data.train, config.data.validation
    stored: dict[Partition, SourceSection] = {} if source.streaming else {"train": source}
    if validation is not None:
        stored["validation"] = validation

    def prepare_all() -> dict[Partition, Path]:
        directory = config.data.cache_dir or default_directory()
        paths = {}
        for name, section in stored.items():
            reader = _reader(config, section, tokenizer, name)
            deciding = _deciding(config, tokenizer, section, name)
            contents = partial(_contents_of, config, section, name)
            paths[name] = prepare(reader, directory, deciding, contents, warn)
        return paths

    paths: dict[Partition, Path] = on_each_node(prepare_all) if stored else {}
    datasets = {name: open_prepared(path) for name, path in paths.items()}
    if not source.streaming:
        return datasets["train"], datasets.get("validation")
    reader = _reader(config, source, tokenizer, "train")
    assert isinstance(reader, ExampleReader), "refused by config.rules"
    stream = ExampleStream(reader, source.shuffle_buffer_size, config.run.seed, row_tokens(config))
    return stream, datasets.get("validation")


def row_tokens(config: RunConfig) -> int | None:
    """Tokens of the rows that training samples share; None: each has its own."""
    return config.data.max_length if config.data.packing else None


def _reader(
    config: RunConfig, source: SourceSection, tokenizer: Any, partition: Partition
) -> ExampleReader | RowReader:
    data, task, limit = config.data, source.task, _limit(config, source, partition)
    if task is not None:
        return RowReader(
            task.name or task.task,
            lambda: islice(task_rows(task, tokenizer, config.run.seed, partition), limit),
            tokenizer=tokenizer,
            max_length=data.max_length,
            too_long=data.too_long,
        )
    return ExampleReader(
        **source.model_dump(exclude={"task", "limit", "shuffle_buffer_size"}),
        limit=limit,
        tokenizer=tokenizer,
        max_length=data.max_length,
        too_long=data.too_long,
        partition=partition,
    )


def _limit(config: RunConfig, source: SourceSection, partition: Partition) -> int | None:
    """The most records that are read, or items that are made."""
    validated = config.evaluation.num_examples if partition == "validation" else None
    return min((n for n in (source.limit, validated) if n is not None), default=None)


def _deciding(
    config: RunConfig, tokenizer: Any, source: SourceSection, partition: Partition
) -> dict[str, Any]:
    """What decides the examples of a source beside what is read; and where that lies."""
    aside = {"limit", "shuffle_buffer_size", "streaming", "revision"}
    settings = source.model_dump(mode="json", exclude=aside) | {
        "partition": partition,
        "limit": _limit(config, source, partition),
        "max_length": config.data.max_length,
        "too_long": config.data.too_long,
    }
    parts = tokenizer_digests(tokenizer)
    if source.format != "chat":
        # It may print the date.
        del parts["chat template"]
    settings["tokenizer"] = parts
    if source.task is not None:
        settings["seed"] = config.run.seed
    if source.path is not None:
        names = [source.path] if isinstance(source.path, str) else source.path
        settings["path"] = [str(Path(name).absolute()) for name in names]
    return settings


def _contents_of(config: RunConfig, source: SourceSection, partition: Partition) -> str:
    """A digest of all that is read of a source; of a commit on the hub its name, as it cannot change."""
    if source.task is not None:
        return task_contents(source.task)
    if source.path is not None:
        return source_digest(find_files([source.path] if isinstance(source.path, str) else source.path))
    assert source.hub is not None, "refused by config.rules"
    if source.revision is not None:
        return source_digest(texts=[source.revision])
    records = read_records(
        hub=source.hub,
        subset=source.subset,
        split=source.split or partition,
        streaming=source.streaming,
        limit=_limit(config, source, partition),
    )
    seen = RecordsDigest()
    for _ in seen.follow(records, lambda: None):
        pass
    return seen.sha256
