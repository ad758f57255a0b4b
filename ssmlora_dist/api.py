"""The public interface: adapt a model, load, switch and remove its adapters (DESIGN section 4)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ssmlora_dist.adapted_model import AdaptedModel
from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.files import read_adapter
from ssmlora_dist.adapters.injection import insert_adapters, load_adapter_tensors
from ssmlora_dist.adapters.mixing import mix_in, unmix
from ssmlora_dist.adapters.projections import resolve
from ssmlora_dist.adapters.saved import SavedModule
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.models.configuration import ROPE, given_rope, has_rope
from ssmlora_dist.models.structure import decoder_layers, keep_structure, modules_named, structure_of
from ssmlora_dist.named_adapters import (
    activate,
    adapter_names,
    adapter_of,
    attach_saved,
    deactivate,
    known_name,
)

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
        AdapterError: the model has an adapter of that name, or one of PEFT, or lacks a projection or
            module that `config` names.
    """
    structure = keep_structure(model)
    prefix = structure.layers
    config = resolve(config or AdapterConfig(), prefix, structure.linears)
    paths = modules_named(structure, config.modules_to_save)
    if name in adapter_names(model):
        raise AdapterError(
            f"the model has an adapter named {name!r} already; give this one another `name`, or call "
            "remove_adapters first"
        )
    active = getattr(model, "ssmlora_active", None)
    if active is not None:
        deactivate(model)
    try:
        layers = decoder_layers(model)
        model.requires_grad_(False)
        held = dict(model.named_modules())
        # A pipeline stage has nothing in the place of others, or a module without weights.
        saved = {path: SavedModule(held[path]) for path in paths if path in held and held[path]._parameters}
        insert_adapters(layers, config, num_layers=structure.num_layers, prefix=prefix, seed=seed)
        attach_saved(model, saved)
    except BaseException:
        if active is not None:
            activate(model, active)
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
    if known_name(model, name) != model.ssmlora_active:
        deactivate(model)
        activate(model, name)
    return model


def remove_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Takes all adapters off `model`, in place, and returns it: the base model as it was, but frozen.

    `model.requires_grad_(True)` unfreezes it; adapters can be added anew.

    Raises:
        ModelError: as for `add_adapters`.
        AdapterError: the model carries no adapter.
    """
    structure_of(model)
    if not adapter_names(model):
        raise AdapterError("the model carries no adapter, so there is none to remove")
    deactivate(model)
    unmix(model)
    del model.ssmlora_active, model.ssmlora_config, model.ssmlora_inactive
    return model


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
        AdapterError: the directory cannot be read, or was saved for another base model, its RoPE or
            configuration.
    """
    structure = structure_of(model)
    directory = Path(directory).expanduser()
    saved = read_adapter(directory, structure.layers, structure.linears)
    if base_fingerprint and saved.base_fingerprint and base_fingerprint != saved.base_fingerprint:
        raise AdapterError(
            f"{directory}: was trained on another base model ({saved.base.get('path')}, fingerprint "
            f"{saved.base_fingerprint[:12]}) than this one ({base_fingerprint[:12]}); load that base model"
        )
    if ROPE in saved.base and not has_rope(model.config, recorded := saved.base[ROPE]):
        raise AdapterError(
            f"{directory}: was trained with {recorded or 'the RoPE of its base model'}, the model is loaded "
            f"with {given_rope(model.config) or 'its own'}; load it with `rope_parameters={recorded}`"
        )
    before = adapter_names(model)
    name = name or next(iter(before), DEFAULT_NAME)
    if name in before:
        present, _ = adapter_of(model, name)
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
