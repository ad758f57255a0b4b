"""The public interface: adapt a model, save and load its adapter (DESIGN section 4)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.files import read_adapter, write_adapter
from ssmlora_dist.adapters.injection import adapter_parameters, insert_adapters, load_adapter_tensors
from ssmlora_dist.adapters.mixing import mix_in
from ssmlora_dist.adapters.projections import linear_layers, resolve
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.structure import decoder_layers, keep_structure, structure_of
from ssmlora_dist.quantization import QuantizedExperts, stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapters(
    model: PreTrainedModel, config: AdapterConfig | None = None, *, seed: int = 0
) -> PreTrainedModel:
    """Adapts `model` in place, freezes everything else, and returns it.

    At first the adapted model computes what `model` did, bit for bit (`lora_B` starts at zeros).
    `model(...)`, `model.generate(...)` and gradient checkpointing go on working; `model.save_pretrained(...)`
    and `model.push_to_hub(...)` save the adapter.

    Args:
        model: a transformers causal language model, dense or quantised.
        config: where the adapters sit; by default SSMLoRA on alternating q_proj and v_proj, rank 8.
        seed: of the adapters' starting values.

    Raises:
        ModelError: the model is no causal language model by itself with one list of decoder layers.
        AdapterError: the model is adapted already, by PEFT too, or lacks a projection that `config` names.
    """
    structure = keep_structure(model)
    prefix = structure.layers
    config = resolve(config or AdapterConfig(), prefix, structure.linears)
    layers = decoder_layers(model)
    model.requires_grad_(False)
    insert_adapters(layers, config, num_layers=structure.num_layers, prefix=prefix, seed=seed)
    model.ssmlora_config = config
    mix_in(model, AdaptedModel)
    return model


# What others' `save_pretrained` can be told that is so with an adapter directory.
_TRUE_ANYWAY = {"safe_serialization": True, "save_peft_format": True}


class AdaptedModel:
    """Mixed into a model's class by `add_adapters`: what such a model saves is its adapter."""

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
    base_fingerprint: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the adapter of `model` in PEFT's layout; a plain LoRA directory loads in PEFT as it is.

    What the base model is stored and computes in is recorded, so that the adapter comes back on the same.

    Args:
        model: adapted by `add_adapters` or `load_adapter`.
        directory: made if it does not exist.
        base_fingerprint: `models.base_fingerprint` of the base model; recorded, and compared at loading.
        state_dict: values by full name, gathered from a sharded model, in place of the model's own.

    Raises:
        AdapterError: the model carries no adapter, or not all of its values are here.
    """
    config = _config_of(model)
    if config is None:
        raise AdapterError("the model carries no adapter; call add_adapters first")
    write_adapter(
        Path(directory).expanduser(),
        config,
        _values(model, state_dict),
        base={"path": model.config.name_or_path or None, **_precision_of(model)},
        base_fingerprint=base_fingerprint,
    )


def load_adapter(
    model: PreTrainedModel, directory: str | Path, *, base_fingerprint: str | None = None
) -> PreTrainedModel:
    """Loads an adapter directory, ours or PEFT's LoRA, into `model`, in place, and returns it.

    Args:
        model: the base model, or one adapted with the same configuration, whose values are replaced.
        directory: written by `save_adapter`, by a run, or by PEFT.
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
    present = _config_of(model)
    if present is None:
        add_adapters(model, saved.config)
    elif present != resolve(saved.config, structure.layers, structure.linears):
        raise AdapterError(
            f"{directory}: its adapter configuration is {saved.config}, the model has {present}"
        )
    load_adapter_tensors(model, saved.tensors, str(directory))
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


def _values(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The adapters' values by full name."""
    parameters = adapter_parameters(model)
    values = parameters if state_dict is None else {n: state_dict[n] for n in parameters if n in state_dict}
    for name in parameters:
        if name not in values or not values[name].numel():
            raise AdapterError(
                f"{name} has no values here, as ZeRO 3 leaves it between passes; gather the values of all "
                "adapters and pass them as `state_dict`"
            )
    return {**values}


def _config_of(model: PreTrainedModel) -> AdapterConfig | None:
    return getattr(model, "ssmlora_config", None)
