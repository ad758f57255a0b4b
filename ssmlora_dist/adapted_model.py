"""What an adapted model saves: its adapter, by `save_adapter` or by transformers' own `save_pretrained`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.files import write_adapter
from ssmlora_dist.adapters.projections import linear_layers
from ssmlora_dist.adapters.saved import SavedModule
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.configuration import ROPE, given_rope
from ssmlora_dist.models.structure import decoder_layers
from ssmlora_dist.named_adapters import adapter_of, known_name
from ssmlora_dist.quantization import QuantizedExperts, stored_as

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What others' `save_pretrained` can be told that is so with an adapter directory.
_TRUE_ANYWAY = {"safe_serialization": True, "save_peft_format": True}


class AdaptedModel:
    """Mixed into a model's class by `add_adapters`: what such a model saves is its adapter."""

    # What transformers' Trainer asks of a model that transformers has quantised: whether it carries adapters.
    _hf_peft_config_loaded = True

    @property
    def dtype(self) -> torch.dtype:
        """That of the base model, for which transformers would take a trained embedding's."""
        model: Any = self
        embedding = model.get_input_embeddings()
        if isinstance(embedding, SavedModule):
            return embedding.base_layer.weight.dtype  # type: ignore[return-value, union-attr]
        own: torch.dtype = super().dtype  # type: ignore[misc]
        return own

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

    What the base model is stored and computes in is recorded, and the RoPE setting that it was loaded with,
    so that the adapter comes back on the same.

    Args:
        model: adapted by `add_adapters` or `load_adapter`.
        directory: made if it does not exist.
        name: which of several adapters; by default the active one. No file holds it.
        base_fingerprint: `models.base_fingerprint` of the base model; recorded, and compared at loading.
        state_dict: values by full name, gathered from a sharded model, in place of the model's own.

    Raises:
        AdapterError: the model carries no adapter, or none of that name, or not all of its values are here.
    """
    config, parameters = adapter_of(model, known_name(model, name))
    write_adapter(
        Path(directory).expanduser(),
        config,
        _values(parameters, state_dict),
        base={
            "path": model.config.name_or_path or None,
            ROPE: given_rope(model.config),
            **_precision_of(model),
        },
        base_fingerprint=base_fingerprint,
    )


def _precision_of(model: PreTrainedModel) -> dict[str, Any]:
    """Keywords of `models.load_model`; none where the layers differ, which these cannot say."""
    dtype = model.dtype
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
