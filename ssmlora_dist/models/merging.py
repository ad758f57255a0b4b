"""Merging plain LoRA into the full-precision weights of its base model, one tensor at a time."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssmlora_dist.adapters.files import SavedAdapter, read_adapter, read_base, read_config
from ssmlora_dist.adapters.placement import placement
from ssmlora_dist.adapters.projections import named_by, resolve
from ssmlora_dist.durable import explained, sync
from ssmlora_dist.errors import AdapterError, ModelError
from ssmlora_dist.models.configuration import ROPE, given_rope, load_config
from ssmlora_dist.models.conversion import ModelWeights
from ssmlora_dist.models.fingerprint import base_fingerprint
from ssmlora_dist.models.loading import GENERATION_CONFIG_FILE
from ssmlora_dist.models.location import CONFIG_FILE, METADATA_PATTERNS, locate_base
from ssmlora_dist.models.structure import Structure, empty_model, modules_named, structure_of
from ssmlora_dist.models.weights import SafetensorsWeights, is_finite
from ssmlora_dist.ops.registry import form_named
from ssmlora_dist.progress import counted
from ssmlora_dist.tokenization import end_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LoRA = tuple[Tensor, Tensor]
"""`lora_A` [R,D] and `lora_B` [O,R] of one linear layer."""


def merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling B A, computed in float32 (or in W's dtype, if wider) and rounded once to W's dtype.

    Args:
        weight: W, [O,D].
        lora_A: A, [R,D].
        lora_B: B, [O,R].
        scaling: of the adapter's output.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) + scaling * (lora_B.to(dtype) @ lora_A.to(dtype))).to(weight.dtype)


def merge_adapter(directory: Path, out: Path, path: str | None = None) -> int:
    """Writes the base model of a plain LoRA with the adapter merged in, for transformers to load as it is.

    The files are the base model's own, in its dtype and its shards; only the adapted weights differ, and the
    generation configuration has the tokens that end the adapter's answers too, and the model's the RoPE that
    the adapter was trained with. No more than one weight is
    held in memory at a time.

    Args:
        directory: an adapter directory, ours or PEFT's.
        out: the new model's directory; must not exist.
        path: directory or hub name of the base model, where it is not where it was in training.

    Returns:
        The number of merged weights.

    Raises:
        AdapterError: the adapter cannot be read or merged, or is not for this base model.
        ModelError: the base model cannot be found or read, or `out` exists.
        CheckpointError: `out` cannot be written.
    """
    if out.exists():
        raise ModelError(f"{out}: exists, and nothing in it is overwritten; choose another --out")
    base = read_base(directory)
    config = read_config(directory)
    forms = () if config is None else config.methods
    if unmergeable := [name for name in forms if not form_named(name).is_mergeable]:
        raise AdapterError(
            f'{directory}: "{unmergeable[0]}" cannot be merged: it adds more than a product of input and '
            "weight, such as a state; use the adapter as it is, or train plain LoRA"
        )
    is_stored = path is not None or base.get("init") != "random"
    base_directory = locate_base(directory, base, path, weights=True) if is_stored else None
    if base_directory is None:
        raise AdapterError(
            f"{directory}: its base model has no stored weights to merge into; name a model with --model"
        )
    model_config = load_config(str(base_directory), rope_parameters=base.get(ROPE))
    model = empty_model(model_config)
    structure = structure_of(model)
    saved = read_adapter(directory, structure.layers, structure.linears)
    fingerprint = saved.base_fingerprint
    if fingerprint and fingerprint != base_fingerprint(str(base_directory)):
        raise AdapterError(
            f"{directory}: was trained on another base model than {base_directory}; name that one with "
            "--model"
        )
    weights = ModelWeights(base_directory, model)
    adapters, whole = _by_weight(saved, structure, directory)
    if structure.tied and structure.embedding in modules_named(structure, saved.config.modules_to_save):
        raise AdapterError(
            f"{directory}: trains {structure.embedding}, to which the output head of its base model is tied, "
            "and not the head: they cannot be stored as one; use the adapter as it is"
        )
    rank = saved.config.rank
    for name in (*adapters, *whole):
        if weights.is_converted(name):
            raise AdapterError(
                f"{directory}: its base model does not store {name} as it is, and so nothing can be merged "
                "into it; load the base model with transformers, save it with save_pretrained(..., "
                "save_original_format=False), and name that with --model"
            )
    for name, (lora_A, lora_B) in adapters.items():
        num_out, num_in = weights.stored(name).shape
        if (lora_A.shape, lora_B.shape) != ((rank, num_in), (num_out, rank)):
            raise AdapterError(
                f"{directory}: its adapter of {name} is {list(lora_A.shape)} and {list(lora_B.shape)}, where "
                f"the model needs rank {rank} for {num_in} -> {num_out}; name its own base model with --model"
            )
    for name, tensor in whole.items():
        if tensor.shape != (shape := torch.Size(weights.stored(name).shape)):
            raise AdapterError(
                f"{directory}: its {name} is {list(tensor.shape)}, where the model has {list(shape)}; name "
                "its own base model with --model"
            )
    ends = _generation_settings(weights.directory, model_config, base.get("end_token_ids") or [])
    changed = {} if ends is None else {GENERATION_CONFIG_FILE: ends}
    if given_rope(model_config):
        changed[CONFIG_FILE] = _with_rope(weights.directory, model_config)
    _write(weights, adapters, saved.config.scaling, whole, changed, out)
    return len(adapters) + len(whole)


def _by_weight(
    saved: SavedAdapter, structure: Structure, directory: Path
) -> tuple[dict[str, LoRA], dict[str, Tensor]]:
    """The adapter of each adapted weight, by the weight's name, and the tensors that are saved whole.

    Exactly those that the placement asks for.
    """
    config = resolve(saved.config, structure.layers, structure.linears)
    modules = [
        f"{structure.layers}.{layer_idx}.{path}"
        for layer_idx, paths in enumerate(structure.linears)
        for projection in placement(config, layer_idx)
        for path in named_by(projection, paths)
    ]
    expected = {f"{module}.lora_{which}.weight" for module in modules for which in "AB"}
    paths = modules_named(structure, config.modules_to_save)
    whole = {name: tensor for name, tensor in saved.tensors.items() if name.rpartition(".")[0] in paths}
    expected |= whole.keys() | {f"{path}.weight" for path in paths}
    for name in sorted(expected ^ set(saved.tensors)):
        problem = "lacks" if name in expected else "holds"
        raise AdapterError(
            f"{directory}: {problem} {name}, unlike its placement over {structure.num_layers} layers; it was "
            "saved for another model"
        )
    tensors = saved.tensors
    adapters = {
        f"{module}.weight": (tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"])
        for module in modules
    }
    return adapters, whole


def _with_rope(directory: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """The model's own `config.json`, with the RoPE that it is loaded with."""
    values = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    own = values.get("text_config", values)
    for name in ("rope_scaling", "rope_theta"):
        own.pop(name, None)
    own[ROPE] = getattr(config.get_text_config(), ROPE)
    return dict(values)


def _generation_settings(
    directory: Path, config: PreTrainedConfig, end_ids: Sequence[int]
) -> dict[str, Any] | None:
    """The model's own, ending answers with `end_ids` too; None where they are as they should be.

    Its JSON and no object of transformers, which refuses to write what some models come with.
    """
    file = directory / GENERATION_CONFIG_FILE
    if file.is_file():
        try:
            settings = dict(json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read as JSON ({error}); fetch the file again") from error
    else:
        own = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        settings = {key: value for key, value in own.items() if value is not None}
    known = end_token_ids(settings.get("eos_token_id"))
    ends = end_token_ids(known, end_ids)
    return None if ends == known else {**settings, "eos_token_id": ends}


def _write(
    weights: SafetensorsWeights,
    adapters: Mapping[str, LoRA],
    scaling: float,
    whole: Mapping[str, Tensor],
    changed: Mapping[str, Mapping[str, Any]],
    out: Path,
) -> None:
    """Copies the model, merging on the way, with `changed` JSON files; `out` appears when it is complete."""
    base = weights.directory
    stray = [file for file in weights.files if file.parent != base]
    if stray:
        raise ModelError(f"{base}: its index names {stray[0]}, which is outside; name a complete model")
    metadata = {file for pattern in METADATA_PATTERNS for file in base.glob(pattern) if file.is_file()}
    beside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    with explained(out, "choose another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.mkdir()
            copied = (*metadata, *weights.files)
            for file in counted(copied, "copying the base model", len(copied)):
                shutil.copyfile(file, beside / file.name)
            for name, content in changed.items():
                (beside / name).write_text(json.dumps(content, indent=2) + "\n")
            names = (*adapters, *whole)
            for name in counted(names, "merging", len(names)):
                stored = weights.stored(name)
                own = stored.read()
                weight = (
                    merged(own, *adapters[name], scaling) if name in adapters else whole[name].to(own.dtype)
                )
                if not is_finite(weight):
                    raise AdapterError(
                        f"{name}: merged it is not finite in {weight.dtype}, in which the base model is "
                        "stored; name a copy of it in a wider dtype with --model, or use the adapter unmerged"
                    )
                _overwrite(beside / stored.file.name, stored.begin, weight)
            for file in counted(beside.iterdir(), "waiting for the disk", len(copied)):
                sync(file)
            sync(beside)
            beside.rename(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        sync(out.parent)


def _overwrite(file: Path, begin: int, tensor: Tensor) -> None:
    content: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    with file.open("rb+") as stream:
        stream.seek(begin)
        stream.write(content)
