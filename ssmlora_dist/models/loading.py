"""A backbone from its weights, read, quantised and released one tensor at a time (DESIGN section 7).

The model is built without storage; then it is filled part by part: embedding, each decoder layer, final norm,
output head. `fill` does one part, so a process that holds only some parts, or shards each before the next is
read, fills those in its own order.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.configuration import load_config
from ssmlora_dist.models.families import Family, require_supported
from ssmlora_dist.models.location import locate
from ssmlora_dist.models.stage import StageLayers, cut_to_stage
from ssmlora_dist.models.weights import (
    HalvedTable,
    RandomWeights,
    SafetensorsWeights,
    WeightSource,
    initializer_std,
    rows_of_half,
)
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.progress import counted
from ssmlora_dist.quantization import QuantizationMode, expert_weights, quantize_experts, quantize_linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig, PreTrainedModel

Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]
GENERATION_CONFIG_FILE = "generation_config.json"


def load_model(
    path: str | None = None,
    *,
    init: Literal["pretrained", "random"] = "pretrained",
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    quantization: QuantizationMode | Literal["none"] = "nf4",
    double_quantization: bool = True,
    compute_dtype: torch.dtype | None = None,
    attention: Attention = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    stage: StageLayers | None = None,
    on_part: Callable[[nn.Module], None] | None = None,
    swap_rows: Callable[[Tensor, Tensor], None] | None = None,
) -> PreTrainedModel:
    """A frozen causal language model on `device`, in evaluation mode.

    The projections of the decoder layers are quantised; embedding, norms and output head stay in the compute
    dtype. Tied weights are one parameter. The weights are those of transformers' own loading, bit for bit.

    Args:
        path: a directory, or the name of a model on the hub.
        init: `pretrained` reads the weights; `random` draws them from `seed`.
        config: a bare transformers configuration with `model_type`, for `init="random"`; by default that of
            `path`.
        revision: of the model on the hub.
        quantization: `nf4`, `fp4`, `int8` or `none`.
        double_quantization: in 4 bits, store the scales in 8 bits too.
        compute_dtype: dtype of everything that is not quantised, and of the products of what is; None takes
            what machines with such a device compute in.
        attention: `auto` takes flash-attention where it is installed and the device is CUDA, else sdpa (eager
            for families whose capped attention logits sdpa cannot do).
        device: where the weights are quantised and stay.
        seed: of random weights.
        stage: the pipeline stage to load: only what it needs is read and kept; None loads the whole model.
        on_part: called with the embedding, each decoder layer, the final norm and the head, as soon as it has
            its weights and before the next is read; it may put others in the place of their data.
        swap_rows: for the first and the last stage, which both need an embedding that is tied to the head:
            each reads half of its rows, sends them (the first argument) to the other, and receives those of
            the other (into the second). None reads the whole table.

    Raises:
        ModelError: the model cannot be found or read, is not supported, or lacks weights; an attention
            implementation that is not available.
    """
    if init == "pretrained" and (path is None or config is not None):
        raise ModelError(
            "model: pretrained weights come from `model.path`, with their own configuration; drop "
            '`model.config`, or set `model.init` to "random"'
        )
    device = torch.device(device)
    compute_dtype = compute_dtype or getattr(torch, machine_dtype(device.type))
    model_config = load_config(path, config=config, revision=revision)
    family = require_supported(model_config.model_type)
    directory = None
    if path is not None and config is None:
        directory = locate(path, revision, weights=init == "pretrained")
    if init == "random":
        source: WeightSource = _random_weights(model_config, family, seed)
    else:
        assert directory is not None
        source = _stored_weights(directory, model_config, family, stage, swap_rows)
    implementation = attention_implementation(attention, family, device, compute_dtype)
    model = build_skeleton(model_config, compute_dtype, implementation, device)
    quantize: dict[str, Any] | None = None
    if quantization != "none":
        quantize = {"mode": quantization, "double_quantization": double_quantization}
    names = part_names(model_config, family) if stage is None else stage.part_names(model_config, family)
    parts = {name: model.get_submodule(name) for name in names}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if quantize is not None:
        _refuse_unknown_experts(parts.values())
    source.check(_shapes(parts), model.state_dict().keys(), ignored)
    doing = "loading" if quantize is None else "loading and quantising"
    for name, part in counted(parts.items(), f"{doing} the base model", len(parts)):
        fill(part, name, source, family, device=device, dtype=compute_dtype, quantize=quantize)
        if on_part is not None:
            on_part(part)
        _return_free_memory()
    model.tie_weights()
    if stage is not None:
        cut_to_stage(model, family, stage)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if directory is not None:
        _take_generation_config(model, directory)
    return model.requires_grad_(False).eval()


def part_names(config: PreTrainedConfig, family: Family) -> list[str]:
    """Paths of the parts that hold weights of their own, in the order of the forward pass.

    A head that is tied to the embedding is no part: it has no weight of its own.
    """
    layers = [f"{family.layers}.{index}" for index in range(config.num_hidden_layers)]
    head = [] if config.tie_word_embeddings else [family.output_head]
    return [family.embedding, *layers, family.final_norm, *head]


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, device: torch.device
) -> PreTrainedModel:
    """The model with parameters that have shapes but no storage; buffers that no file holds are real.

    Raises:
        ModelError: transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"model: transformers cannot build this {config.model_type} model: {reason}"
        ) from error
    owners: dict[str, nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, key = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        setattr(owners[owner], key, torch.empty_like(buffer, device=device))
    for module in owners.values():
        # The hook by which transformers itself computes rotary frequencies and embedding scales.
        model._init_weights(module)
    return cast("PreTrainedModel", model)


def fill(
    part: nn.Module,
    name: str,
    source: WeightSource,
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: Mapping[str, Any] | None = None,
) -> None:
    """Gives `part` its weights, frozen: each is read, quantised if a projection's or experts', and released.

    Args:
        part: an embedding, decoder layer, norm or head, whose parameters have no storage yet.
        name: its path in the model.
        source: what to read from.
        family: names the projections.
        device: where the weights go, and are quantised.
        dtype: of the weights.
        quantize: `mode` and `double_quantization` of `quantize_linear` and `quantize_experts`; None leaves
            all weights dense.

    Raises:
        ModelError: a tensor cannot be read.
    """
    projections = set(family.projections.values())

    def fill_module(path: str) -> None:
        module = part.get_submodule(path)
        prefix = f"{name}.{path}" if path else name

        def read(key: str, shape: torch.Size) -> Tensor:
            return source.read(f"{prefix}.{key}", shape=shape, device=device, dtype=dtype)

        if quantize is not None and expert_weights(module):
            part.set_submodule(path, quantize_experts(module, read, compute_dtype=dtype, **quantize))
            return
        for key, empty in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(read(key, empty.shape), requires_grad=False))
        if quantize is not None and path in projections:
            assert isinstance(module, nn.Linear)
            part.set_submodule(path, quantize_linear(module, compute_dtype=dtype, **quantize))

    # By path, and in a function: any name that outlived its turn would keep a dense layer alive.
    for path in [path for path, _ in part.named_modules()]:
        fill_module(path)


def _refuse_unknown_experts(parts: Iterable[nn.Module]) -> None:
    """Raises ModelError if any of `parts` holds experts that cannot be quantised."""
    for part in parts:
        for module in part.modules():
            expert_weights(module)


def _shapes(parts: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """Shapes of all tensors that `parts` need, by full name."""
    return {
        f"{name}.{key}": parameter.shape
        for name, part in parts.items()
        for key, parameter in part.named_parameters()
    }


def _return_free_memory() -> None:
    """Hands back what lies free between the tensors that stay: dense weights were there, and temporaries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other allocators do without
    if trim is not None:
        trim(0)


def attention_implementation(
    attention: Attention, family: Family, device: torch.device, compute_dtype: torch.dtype
) -> str:
    """The attention implementation of transformers that `attention` stands for.

    Raises:
        ModelError: one was asked for by name that cannot work here.
    """
    if attention == "auto":
        if _flash_attention_problem(device, compute_dtype) is None:
            return "flash_attention_2"
        return "sdpa" if family.supports_sdpa else "eager"
    if attention == "sdpa" and not family.supports_sdpa:
        raise ModelError(
            f"model.attention: sdpa cannot cap attention logits, which {family.model_type} models need; use "
            '"eager", "flash_attention_2" or "auto"'
        )
    if attention == "flash_attention_2" and (problem := _flash_attention_problem(device, compute_dtype)):
        raise ModelError(f'model.attention: flash_attention_2 {problem}; use "auto" or "sdpa"')
    return attention


def _flash_attention_problem(device: torch.device, compute_dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, and this is {device.type}"
    if compute_dtype not in (torch.bfloat16, torch.float16):
        return "needs a compute dtype of 16 bits"
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn, which is not installed"
    return None


def _stored_weights(
    directory: Path,
    config: PreTrainedConfig,
    family: Family,
    stage: StageLayers | None,
    swap_rows: Callable[[Tensor, Tensor], None] | None,
) -> WeightSource:
    embedding, head = f"{family.embedding}.weight", f"{family.output_head}.weight"
    if not config.tie_word_embeddings:
        return SafetensorsWeights(directory)
    weights = SafetensorsWeights(directory, aliases={embedding: head})
    source: WeightSource = weights
    compared: Callable[[int], range] = range
    if swap_rows is not None and stage is not None and stage.is_first != stage.is_last:
        source = HalvedTable(weights, embedding, second=stage.is_last, swap_rows=swap_rows)
        compared = partial(rows_of_half, second=stage.is_last)
    holds_table = stage is None or stage.is_first or stage.is_last
    if holds_table and not weights.equal(embedding, head, compared):
        raise ModelError(
            f"{directory}: `config.json` ties the output head to the embedding, but {head} and {embedding} "
            "differ; set `tie_word_embeddings` to false in it"
        )
    return source


def _random_weights(config: PreTrainedConfig, family: Family, seed: int) -> RandomWeights:
    padding_rows = {}
    if config.pad_token_id is not None:
        padding_rows[f"{family.embedding}.weight"] = config.pad_token_id
    return RandomWeights(
        seed,
        std=initializer_std(config),
        norm_weight=family.initial_norm_weight,
        padding_rows=padding_rows,
    )


def _take_generation_config(model: PreTrainedModel, directory: Path) -> None:
    from transformers import GenerationConfig

    if not (directory / GENERATION_CONFIG_FILE).is_file():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{directory / GENERATION_CONFIG_FILE}: cannot be read: {reason}") from error
