"""The public interface: adapt a model, save, load, switch and remove its adapters (DESIGN section 4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.files import read_adapter, write_adapter
from ssmlora_dist.adapters.injection import (
    Adapters,
    adapter_parameters,
    attach_adapters,
    detach_adapters,
    insert_adapters,
    load_adapter_tensors,
)
from ssmlora_dist.adapters.mixing import mix_in, unmix
from ssmlora_dist.adapters.projections import linear_layers, resolve
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.structure import decoder_layers, keep_structure, structure_of
from ssmlora_dist.quantization import QuantizedExperts, stored_as
from ssmlora_dist.records import nearest_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DEFAULT_NAME = "default"


def add_adapters(
    model: PreTrainedModel, config: AdapterConfig | None = None, *, name: str = DEFAULT_NAME, seed: int = 0
) -> PreTrainedModel:
    """Adapts `model` in place, freezes everything else, and returns it.

    A model can have several adapters of different configurations, one of which is active: the one added last,
    or chosen by `set_adapter`. The others take no part in anything, `model.parameters()` included.

    At first the adapted model computes what `model` did, bit for bit (`lora_B` starts at zeros).
    `model(...)`, `model.generate(...)` and gradient checkpointing go on working; `model.save_pretrained(...)`
    and `model.push_to_hub(...)` save the adapter.

    Args:
        model: a transformers causal language model, dense or quantised.
        config: where the adapters sit; by default SSMLoRA on alternating q_proj and v_proj, rank 8.
        name: by which `set_adapter` finds it.
        seed: of the adapters' starting values.

    Raises:
        ModelError: the model is no causal language model by itself with one list of decoder layers.
        AdapterError: the model has an adapter of that name, or one of PEFT, or lacks a projection that
            `config` names.
    """
    structure = keep_structure(model)
    prefix = structure.layers
    config = resolve(config or AdapterConfig(), prefix, structure.linears)
    if name in _names(model):
        raise AdapterError(
            f"the model has an adapter named {name!r} already; give this one another `name`, or call "
            "remove_adapters first"
        )
    active = getattr(model, "ssmlora_active", None)
    if active is not None:
        _deactivate(model)
    try:
        layers = decoder_layers(model)
        model.requires_grad_(False)
        insert_adapters(layers, config, num_layers=structure.num_layers, prefix=prefix, seed=seed)
    except BaseException:
        if active is not None:
            _activate(model, active)
        raise
    if active is None:
        model.ssmlora_inactive = {}
        mix_in(model, AdaptedModel)
    model.ssmlora_active, model.ssmlora_config = name, config
    return model


def set_adapter(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Makes the adapter `name` the active one, in place, and returns the model.

    Parameters are the same objects when an adapter becomes active again. No other thread may run the model
    meanwhile.

    Args:
        model: adapted.
        name: as given to `add_adapters` or `load_adapter`.

    Raises:
        ModelError: as for `add_adapters`.
        AdapterError: the model has no such adapter; those that it has are named.
    """
    structure_of(model)
    if _known(model, name) != model.ssmlora_active:
        _deactivate(model)
        _activate(model, name)
    return model


def remove_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Takes all adapters off `model`, in place, and returns it: the base model as it was, but frozen.

    `model.requires_grad_(True)` unfreezes it; adapters can be added anew.

    Raises:
        ModelError: as for `add_adapters`.
        AdapterError: the model carries no adapter.
    """
    structure_of(model)
    if not _names(model):
        raise AdapterError("the model carries no adapter, so there is none to remove")
    _deactivate(model)
    unmix(model)
    del model.ssmlora_active, model.ssmlora_config, model.ssmlora_inactive
    return model


@dataclass(frozen=True)
class TrainableParameters:
    """How much of a model is trained; as text, the line that PEFT prints.

    Attributes:
        by_name: numbers of the trainable parameters, by full name.
        total: number of all parameters, trained or not; quantised ones by the numbers that they stand for.
    """

    by_name: dict[str, int]
    total: int

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(self.by_name.values())

    def __str__(self) -> str:
        percent = 100 * self.trainable / self.total if self.total else 0.0
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {percent:.4f}"
        )


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Counts what of `model` is trained, and all of it; inactive adapters do not count."""
    by_name: dict[str, int] = {}
    total = 0
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count = _number_of(module, name, parameter)
            total += count
            if parameter.requires_grad:
                by_name[f"{path}.{name}" if path else name] = count
    return TrainableParameters(by_name, total)


def _number_of(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    if isinstance(module, nn.Linear) and name == "weight":
        # Packed in 4 bits there are fewer elements.
        return module.in_features * module.out_features
    if isinstance(module, QuantizedExperts) and name in module.shapes:
        return module.shapes[name].numel()
    # Under ZeRO 3 the parameter itself is empty.
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@dataclass(frozen=True)
class _InactiveAdapter:
    config: AdapterConfig
    adapters: Adapters


def _names(model: PreTrainedModel) -> list[str]:
    """Of the model's adapters, the active one first."""
    active = getattr(model, "ssmlora_active", None)
    return [] if active is None else [active, *model.ssmlora_inactive]


def _known(model: PreTrainedModel, name: str | None = None) -> str:
    """The name of an adapter that the model has, by default of the active one."""
    names = _names(model)
    if not names:
        raise AdapterError("the model carries no adapter; call add_adapters first")
    if name is None:
        return names[0]
    if name not in names:
        raise AdapterError(
            f"the model has no adapter named {name!r}{nearest_name(name, names)}; it has "
            f"{', '.join(map(repr, names))}"
        )
    return name


def _deactivate(model: PreTrainedModel) -> None:
    adapters = detach_adapters(decoder_layers(model))
    model.ssmlora_inactive[model.ssmlora_active] = _InactiveAdapter(model.ssmlora_config, adapters)


def _activate(model: PreTrainedModel, name: str) -> None:
    chosen: _InactiveAdapter = model.ssmlora_inactive.pop(name)
    for adapted in (each for own in chosen.adapters.values() for each in own.values()):
        adapted.follow_base_layer()
    layers = decoder_layers(model)
    attach_adapters(layers, chosen.adapters, chosen.config, num_layers=structure_of(model).num_layers)
    model.ssmlora_active, model.ssmlora_config = name, chosen.config


# What others' `save_pretrained` can be told that is so with an adapter directory.
_TRUE_ANYWAY = {"safe_serialization": True, "save_peft_format": True}


class AdaptedModel:
    """Mixed into a model's class by `add_adapters`: what such a model saves is its adapter."""

    # What transformers' Trainer asks of a model that transformers has quantised: whether it carries adapters.
    _hf_peft_config_loaded = True

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **hub: Any,
    ) -> None:
        """Writes an adapter directory, as `save_adapter` does; the base model is not saved.

        Args:
            save_directory: made if it does not exist.
            is_main_process: others write nothing.
            state_dict: as for `save_adapter`.
            push_to_hub: upload the directory too.
            max_shard_size: of no account: an adapter is one file.
            hub: `repo_id`, by default the directory's name, and what else the model's `push_to_hub` takes.

        Raises:
            AdapterError: an option that an adapter directory has no counterpart for, or values are not here.
        """
        model: Any = self
        hub = {n: v for n, v in hub.items() if v is not None and (n, v) not in _TRUE_ANYWAY.items()}
        if hub and not push_to_hub:
            raise AdapterError(
                "save_pretrained of an adapted model writes an adapter directory, which has no "
                f"{', '.join(sorted(hub))}; leave it out, or load the base model alone to save that"
            )
        if not is_main_process:
            return
        save_adapter(model, Path(save_directory), state_dict=state_dict)
        if push_to_hub:
            model.push_to_hub(hub.pop("repo_id", None) or Path(save_directory).resolve().name, **hub)

    def _of_peft(self, *_: Any, **__: Any) -> NoReturn:
        # Some would silently do nothing.
        raise AdapterError(
            "this method of transformers is for adapters of PEFT; use disabled_adapters, set_adapter, "
            "load_adapter, add_adapters or remove_adapters of ssmlora_dist, which take the model"
        )

    add_adapter = load_adapter = delete_adapter = get_adapter_state_dict = _of_peft
    set_adapter = active_adapters = enable_adapters = disable_adapters = _of_peft

    def _replicate_for_data_parallel(self) -> None:
        # A replica's layers would run the adapters of the first device.
        raise AdapterError(
            "torch.nn.DataParallel cannot run an adapted model; start one process for each device (torchrun, "
            "deepspeed), with DistributedDataParallel where a loop of your own trains"
        )


def save_adapter(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str | None = None,
    base_fingerprint: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter of `model` in PEFT's layout; a plain LoRA directory loads in PEFT as it is.

    What the base model is stored and computes in is recorded, so that the adapter comes back on the same.

    Args:
        model: adapted by `add_adapters` or `load_adapter`.
        directory: made if it does not exist.
        name: which of several adapters; by default the active one. No file holds it.
        base_fingerprint: `models.base_fingerprint` of the base model; recorded, and compared at loading.
        state_dict: values by full name, gathered from a sharded model, in place of the model's own.

    Raises:
        AdapterError: the model carries no adapter, or none of that name, or not all of its values are here.
    """
    config, parameters = _adapter_of(model, _known(model, name))
    write_adapter(
        Path(directory).expanduser(),
        config,
        _values(parameters, state_dict),
        base={"path": model.config.name_or_path or None, **_precision_of(model)},
        base_fingerprint=base_fingerprint,
    )


def load_adapter(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    name: str | None = None,
    base_fingerprint: str | None = None,
) -> PreTrainedModel:
    """Loads an adapter directory, ours or PEFT's LoRA, into `model`, in place, and returns it.

    It becomes the active adapter.

    Args:
        model: the base model, or an adapted one.
        directory: written by `save_adapter`, by a run, or by PEFT.
        name: of the adapter; where the model has one of that name and of the same configuration, its values
            are replaced. By default the active one, and "default" for a model without any.
        base_fingerprint: of `model`; a directory that records another one is refused.

    Raises:
        ModelError: as for `add_adapters`.
        AdapterError: the directory cannot be read, or was saved for another base model or configuration.
    """
    structure = structure_of(model)
    directory = Path(directory).expanduser()
    saved = read_adapter(directory, structure.layers, structure.linears)
    if base_fingerprint and saved.base_fingerprint and base_fingerprint != saved.base_fingerprint:
        raise AdapterError(
            f"{directory}: was trained on another base model ({saved.base.get('path')}, fingerprint "
            f"{saved.base_fingerprint[:12]}) than this one ({base_fingerprint[:12]}); load that base model"
        )
    before = _names(model)
    name = name or next(iter(before), DEFAULT_NAME)
    if name in before:
        present, _ = _adapter_of(model, name)
        if present != resolve(saved.config, structure.layers, structure.linears):
            raise AdapterError(
                f"{directory}: its adapter configuration is {saved.config}, the model has "
                f"{present} under the name {name!r}; load it under another `name`"
            )
        set_adapter(model, name)
        load_adapter_tensors(model, saved.tensors, str(directory))
        return model
    add_adapters(model, saved.config, name=name)
    try:
        load_adapter_tensors(model, saved.tensors, str(directory))
    except AdapterError:
        if before:
            set_adapter(model, before[0])
            del model.ssmlora_inactive[name]
        else:
            remove_adapters(model)
        raise
    return model


def _precision_of(model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of `models.load_model`; none where the layers differ, which these cannot say."""
    dtype = model.get_input_embeddings().weight.dtype
    stored = [
        {**stored_as(module), "compute_dtype": _computes_in(module, dtype)}
        for layer in decoder_layers(model).values()
        for module in (*linear_layers(layer).values(), *_experts_of(layer))
    ]
    if any(each != stored[0] for each in stored) or stored[0]["compute_dtype"] != dtype:
        return {}
    return {**stored[0], "compute_dtype": str(dtype).removeprefix("torch.")}


def _experts_of(layer: nn.Module) -> list[QuantizedExperts]:
    return [module for module in layer.modules() if isinstance(module, QuantizedExperts)]


def _computes_in(layer: Any, default: torch.dtype) -> torch.dtype:
    """The dtype of a linear layer's products; `default` where it takes that of its input."""
    dtype: torch.dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype
    return dtype if dtype.is_floating_point else default


def _values(
    parameters: dict[str, nn.Parameter], state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The adapters' values by full name."""
    values: Mapping[str, Tensor] = (
        parameters if state_dict is None else {n: state_dict[n] for n in parameters if n in state_dict}
    )
    for name in parameters:
        if name not in values or not values[name].numel():
            raise AdapterError(
                f"{name} has no values here, as ZeRO 3 leaves it between passes; gather the values of all "
                "adapters and pass them as `state_dict`"
            )
    return {**values}


def _adapter_of(model: PreTrainedModel, name: str) -> tuple[AdapterConfig, dict[str, nn.Parameter]]:
    """Configuration of the adapter `name`, and its parameters by full name."""
    if name == model.ssmlora_active:
        return model.ssmlora_config, adapter_parameters(model)
    inactive: _InactiveAdapter = model.ssmlora_inactive[name]
    prefix = structure_of(model).layers
    return inactive.config, {
        f"{prefix}.{layer_idx}.{path}.{parameter_name}": parameter
        for layer_idx, own in inactive.adapters.items()
        for path, adapted in own.items()
        for parameter_name, parameter in adapter_parameters(adapted).items()
    }
