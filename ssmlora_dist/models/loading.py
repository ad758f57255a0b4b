"""A backbone from its weights, read, quantised and released one tensor at a time (DESIGN section 7).

The model is built without storage; then it is filled part by part: embedding, each decoder layer, final norm,
output head. `fill` does one part, so a process that holds only some parts, or shards each before the next is
read, fills those in its own order.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.projections import linear_layers
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.configuration import load_config
from ssmlora_dist.models.conversion import ModelWeights
from ssmlora_dist.models.location import locate
from ssmlora_dist.models.stage import StageLayers, cut_to_stage
from ssmlora_dist.models.structure import (
    Structure,
    empty_model,
    keep_structure,
    model_class,
    stored_tensors_of,
)
from ssmlora_dist.models.weights import (
    HalvedTable,
    RandomWeights,
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
    rope_parameters: Mapping[str, Any] | None = None,
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

    The linear layers of the decoder layers are quantised; embedding, norms, routers and output head stay in
    the compute dtype. Tied weights are one parameter. The weights are those of transformers' own loading, bit
    for bit.

    Args:
        path: a directory, or the name of a model on the hub.
        init: `pretrained` reads the weights; `random` draws them from `seed`.
        config: a bare transformers configuration with `model_type`, for `init="random"`; by default that of
            `path`.
        revision: of the model on the hub.
        rope_parameters: scaling of the RoPE in place of the model's own, by the names of
            `ssmlora_dist.rope.RopeParameters`: `{"rope_type": "yarn", "factor": 4.0}`.
        quantization: `nf4`, `fp4`, `int8` or `none`.
        double_quantization: in 4 bits, store the scales in 8 bits too.
        compute_dtype: dtype of everything that is not quantised, and of the products of what is; None takes
            what machines with such a device compute in.
        attention: `auto` takes flash-attention where it is installed and the device is CUDA, else sdpa (eager
            for models that transformers does not run with sdpa).
        device: where the weights are quantised and stay.
        seed: of random weights.
        stage: the pipeline stage to load: only what it needs is read and kept; None loads the whole model.
        on_part: called with the embedding, each decoder layer, the final norm and the head, as soon as it has
            its weights and before the next is read; it may put others in the place of their data.
        swap_rows: for the first and the last stage, which both need an embedding that is tied to the head:
            each reads half of its rows, sends them (the first argument) to the other, and receives those of
            the other (into the second). None reads the whole table.

    Raises:
        ModelError: the model cannot be found or read, is no list of decoder layers, or lacks weights; an
            attention implementation that is not available.
    """
    if init == "pretrained" and (path is None or config is not None):
        raise ModelError(
            "model: pretrained weights come from `model.path`, with their own configuration; drop "
            '`model.config`, or set `model.init` to "random"'
        )
    device = torch.device(device)
    compute_dtype = compute_dtype or getattr(torch, machine_dtype(device.type))
    model_config = load_config(path, config=config, revision=revision, rope_parameters=rope_parameters)
    directory = None
    if path is not None and config is None:
        directory = locate(path, revision, weights=init == "pretrained")
    implementation = attention_implementation(attention, model_config, device, compute_dtype)
    model = build_skeleton(model_config, compute_dtype, implementation, device)
    structure = keep_structure(model)
    if init == "random":
        source: WeightSource = _random_weights(model, structure, seed)
    else:
        assert directory is not None
        source = _stored_weights(directory, model, structure, stage, swap_rows)
    quantize: dict[str, Any] | None = None
    if quantization != "none":
        quantize = {
            "mode": quantization,
            "double_quantization": double_quantization,
            "compute_dtype": compute_dtype,
        }
    held = stage or StageLayers(0, structure.num_layers, structure.num_layers)
    parts = {name: model.get_submodule(name) for name in held.part_names(structure)}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if quantize is not None:
        _refuse_unknown_experts(parts.values())
    source.check(_shapes(parts), model.state_dict().keys(), ignored)
    doing = "loading" if quantize is None else "loading and quantising"
    for name, part in counted(parts.items(), f"{doing} the base model", len(parts)):
        is_layer = name.startswith(f"{structure.layers}.")
        fill(part, name, source, device=device, quantize=quantize if is_layer else None)
        if on_part is not None:
            on_part(part)
        _return_free_memory()
    model.tie_weights()
    if stage is not None:
        cut_to_stage(model, stage)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    if directory is not None:
        _take_generation_config(model, directory)
    return model.requires_grad_(False).eval()


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, device: torch.device
) -> PreTrainedModel:
    """The model with parameters that have shapes but no storage; buffers that no file holds are real.

    Raises:
        ModelError: transformers cannot build it.
    """
    model = empty_model(config, dtype=dtype, attn_implementation=attention)
    owners: dict[str, nn.Module] = {}
    computed = list(model.named_non_persistent_buffers())
    for name, buffer in computed:
        owner, _, key = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        setattr(owners[owner], key, _unset(buffer.shape, buffer.dtype, device))
    for module in owners.values():
        # The hook by which transformers itself computes rotary frequencies and embedding scales.
        model._init_weights(module)
    for name, _ in computed:
        if model.get_buffer(name).isnan().any():
            raise uninitialized(config, name)
    _keep_precision(model, dtype)
    return model


def _unset(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """NaN throughout where the dtype has it, so that what is not computed is seen."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)


def _keep_precision(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives tensors that the model wants in another dtype than `dtype` that one."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    wanted = re.compile("|".join(f"({name.replace('*', '.*')})" for name in plan))
    dtypes = list(plan.values())
    for name in stored_tensors_of(model):
        if match := wanted.search(name):
            owner, _, key = name.rpartition(".")
            module, kept = model.get_submodule(owner), dtypes[cast(int, match.lastindex) - 1]
            _set(module, key, getattr(module, key).to(kept))


def _set(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter, frozen, or of a buffer."""
    is_parameter = key in module._parameters
    setattr(module, key, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def fill(
    part: nn.Module,
    name: str,
    source: WeightSource,
    *,
    device: torch.device,
    quantize: Mapping[str, Any] | None = None,
) -> None:
    """Gives `part` its weights, frozen: each is read, quantised where it multiplies, and released.

    Args:
        part: an embedding, decoder layer, norm or head, whose tensors have no storage yet, but a dtype.
        name: its path in the model.
        source: what to read from.
        device: where the weights go, and are quantised.
        quantize: keywords of `quantize_linear` and `quantize_experts`; None leaves all weights dense.

    Raises:
        ModelError: a tensor cannot be read.
    """
    projections = set() if quantize is None else set(linear_layers(part))

    def fill_module(path: str) -> None:
        module = part.get_submodule(path)
        prefix = f"{name}.{path}" if path else name

        def read(key: str, shape: torch.Size) -> Tensor:
            empty = getattr(module, key)
            return source.read(f"{prefix}.{key}", shape=shape, device=device, dtype=empty.dtype)

        if quantize is not None and expert_weights(module):
            part.set_submodule(path, quantize_experts(module, read, **quantize))
            return
        for key in [key for key in stored_tensors_of(module) if "." not in key]:
            _set(module, key, read(key, getattr(module, key).shape))
        if quantize is not None and path in projections:
            assert isinstance(module, nn.Linear)
            part.set_submodule(path, quantize_linear(module, **quantize))

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
        f"{name}.{key}": getattr(part.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]).shape
        for name, part in parts.items()
        for key in stored_tensors_of(part)
    }


def _return_free_memory() -> None:
    """Hands back what lies free between the tensors that stay: dense weights were there, and temporaries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other allocators do without
    if trim is not None:
        trim(0)


def attention_implementation(
    attention: Attention, config: PreTrainedConfig, device: torch.device, compute_dtype: torch.dtype
) -> str:
    """The attention implementation of transformers that `attention` stands for.

    Raises:
        ModelError: one was asked for by name that cannot work here.
    """
    model = model_class(config)
    flash_problem = _flash_attention_problem(device, compute_dtype)
    if not model._supports_flash_attn:
        flash_problem = f"is not implemented for {config.model_type} models in transformers"
    if attention == "auto":
        if flash_problem is None:
            return "flash_attention_2"
        return "sdpa" if model._supports_sdpa else "eager"
    if attention == "sdpa" and not model._supports_sdpa:
        raise ModelError(
            f"model.attention: transformers does not run {config.model_type} models with sdpa, which cannot "
            "do what their attention does, such as a cap of its logits; use "
            '"eager", "flash_attention_2" or "auto"'
        )
    if attention == "flash_attention_2" and (problem := flash_problem):
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
    model: PreTrainedModel,
    structure: Structure,
    stage: StageLayers | None,
    swap_rows: Callable[[Tensor, Tensor], None] | None,
) -> WeightSource:
    embedding, head = f"{structure.embedding}.weight", f"{structure.output_head}.weight"
    if not structure.tied:
        return ModelWeights(directory, model)
    weights = ModelWeights(directory, model, aliases={embedding: head})
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


def _random_weights(model: PreTrainedModel, structure: Structure, seed: int) -> RandomWeights:
    padding_rows, table = {}, model.get_submodule(structure.embedding)
    if (padding := getattr(table, "padding_idx", None)) is not None:
        padding_rows[f"{structure.embedding}.weight"] = padding
    return RandomWeights(
        seed,
        std=initializer_std(model.config),
        initial_value=partial(_initial_value, model),
        padding_rows=padding_rows,
    )


def _initial_value(model: PreTrainedModel, name: str) -> Tensor:
    """What the model's own start makes of a vector, in float32 on the CPU; nothing else is touched."""
    owner, _, key = name.rpartition(".")
    # What stands beside it may have its weights already.
    module = _meta_copy(model.get_submodule(owner))
    shape = getattr(module, key).shape
    _set(module, key, _unset(shape, torch.float32, torch.device("cpu")))
    # Vectors that a model draws come from torch's generator, which others use: it is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model._init_weights(module)
        reset: Any = getattr(module, "reset_parameters", None)
        if getattr(module, key).isnan().any() and reset is not None:
            reset()
    value: Tensor = getattr(module, key).detach()
    if value.isnan().any():
        raise uninitialized(model.config, name)
    return value


def _meta_copy(module: nn.Module) -> nn.Module:
    """A copy whose tensors have no storage."""
    meta: nn.Module = copy.copy(module)
    meta._modules = {
        name: None if child is None else _meta_copy(child) for name, child in module._modules.items()
    }
    meta._parameters = {
        name: value if value is None else nn.Parameter(value.detach().to("meta"), requires_grad=False)
        for name, value in module._parameters.items()
    }
    meta._buffers = {
        name: value if value is None else value.to("meta") for name, value in module._buffers.items()
    }
    return meta


def uninitialized(config: PreTrainedConfig, name: str) -> ModelError:
    """Of a tensor that no file holds, and that the model's `_init_weights` does not set."""
    return ModelError(
        f"model: {config.model_type} models do not say how {name} starts (`_init_weights`); "
        'load stored weights, with model.init "pretrained", or have it set there'
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
