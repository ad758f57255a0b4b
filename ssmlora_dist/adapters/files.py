"""Adapter directories: PEFT's layout and key names, plus one file of what SSMLoRA adds.

    adapter_config.json          PEFT's (peft_type LORA for `method: "lora"`, so that PEFT loads it)
    adapter_model.safetensors    float32; keys `base_model.model.<full name>`
    ssmlora.json                 format version, AdapterConfig, how to load the base model, its fingerprint

Only JSON and safetensors are read: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.projections import Paths, named_by, shortest_name
from ssmlora_dist.durable import write_tensors, write_text
from ssmlora_dist.errors import AdapterError
from ssmlora_dist.ops.registry import form_named, form_names

FORMAT_VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
SETTINGS_FILE = "ssmlora.json"
KEY_PREFIX = "base_model.model."
# In a state dict of PEFT the name of the adapter stands in the key; what it saves itself has none.
_NAMED_KEY = re.compile(r"(.*\.lora_[AB])\.([^.]+)(\.weight)")
_ADAPTED = re.compile(r"(.+)\.lora_(?:embedding_)?[AB](?:\..+)?")
# What PEFT can do to a LoRA that this project has no counterpart for, with the value that means "not used".
_UNSUPPORTED_PEFT = {
    "use_dora": False,
    "bias": "none",
    "ensure_weight_tying": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
    "use_qalora": False,
}
# Starts that also change the base model's weights: on the untouched base such a LoRA is another model.
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter directory holds.

    Attributes:
        config: where the adapters sit and how the state runs.
        tensors: parameters by full name in the model.
        base: how to load the base model: keywords of `models.load_model`, and `tokenizer`; beside them what
            ends the answers that were trained, `end_token_ids` and `stop_texts`, where it is known. PEFT
            records the `path` alone.
        base_fingerprint: of the base model, if recorded.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]
    base: dict[str, Any]
    base_fingerprint: str | None


def write_adapter(
    directory: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    *,
    base: Mapping[str, Any] | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Writes an adapter directory; each file is replaced as a whole, the settings last.

    Args:
        directory: made if it does not exist.
        config: of the adapters.
        tensors: every adapter parameter by full name.
        base: see `SavedAdapter`; in JSON types.
        base_fingerprint: of the base model; loading compares it.

    Raises:
        AdapterError: a tensor is empty.
    """
    _refuse_empty(directory, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / WEIGHTS_FILE, {KEY_PREFIX + name: tensor for name, tensor in tensors.items()})
    base = dict(base or {})
    peft = _peft_config(config, tensors, base.get("path"))
    write_text(directory / PEFT_FILE, json.dumps(peft, indent=2) + "\n")
    settings = {
        "format_version": FORMAT_VERSION,
        "adapter": config.model_dump(mode="json"),
        "base": base,
        "base_fingerprint": base_fingerprint,
    }
    write_text(directory / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def read_base(directory: Path) -> dict[str, Any]:
    """How to load the base model of an adapter directory: see `SavedAdapter.base`.

    Raises:
        AdapterError: there is no adapter directory, or it is damaged.
    """
    if not directory.is_dir():
        raise AdapterError(f"{directory}: no such adapter directory; train one first, or correct the path")
    if (directory / SETTINGS_FILE).exists():
        return dict(_read_settings(directory / SETTINGS_FILE).get("base") or {})
    peft = _read_json(directory / PEFT_FILE)
    revision = {"revision": peft["revision"]} if peft.get("revision") else {}
    return {"path": peft.get("base_model_name_or_path"), **revision}


def read_adapter(directory: Path, prefix: str, paths: Paths) -> SavedAdapter:
    """Reads an adapter directory, ours or one of PEFT's LoRA directories.

    Args:
        directory: holds the files named at the top of this module.
        prefix: name of the list of decoder layers in the model it is for, such as `model.layers`.
        paths: of the linear layers of each decoder layer; PEFT's files do not say whether a placement covers
            all layers.

    Raises:
        AdapterError: a file is missing, damaged, of a later version, or uses what is not supported here.
    """
    base = read_base(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory)
    if config is None:
        path = directory / PEFT_FILE
        return SavedAdapter(
            _config_from_peft(_read_json(path), tensors, prefix, paths, path), tensors, base, None
        )
    fingerprint = _read_settings(directory / SETTINGS_FILE).get("base_fingerprint")
    return SavedAdapter(config, tensors, base, fingerprint)


def read_config(directory: Path) -> AdapterConfig | None:
    """The configuration in an adapter directory of ours; None for one of PEFT's, where the tensors tell.

    Raises:
        AdapterError: the settings are damaged or of a later version.
    """
    path = directory / SETTINGS_FILE
    if not path.exists():
        return None
    settings = _read_settings(path).get("adapter")
    if isinstance(settings, dict):
        _refuse_unregistered(path, settings)
    try:
        return AdapterConfig.model_validate(settings)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, ("adapter", *problem["loc"])))
        raise AdapterError(f"{path}: {where}: {problem['msg']}; the file is damaged") from error


def _refuse_unregistered(path: Path, settings: Mapping[str, Any]) -> None:
    for name in (settings.get("method"), settings.get("every_layer_method")):
        if isinstance(name, str) and name not in form_names():
            module = settings.get("form_module")
            trained = f"; in training it came from {module}" if module else ""
            raise AdapterError(
                f'{path}: its form "{name}" is not registered here, and no code is imported because an '
                f"adapter names it{trained}; if you trust that, name it as --form-module (launch/generate.py "
                "and its like) or adapter.form_module (a configuration), or import it before the adapter"
            )


def _read_settings(path: Path) -> dict[str, Any]:
    settings = _read_json(path)
    version = settings.get("format_version")
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}; "
            "use the release that wrote it"
        )
    return settings


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.exists():
        pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
            p.name for p in directory.glob("*.pt")
        )
        remedy = f"{pickles[0]} is a pickle and is not read: save it again as safetensors" if pickles else ""
        raise AdapterError(f"{directory}: holds no {WEIGHTS_FILE}; {remedy or 'copy or train it again'}")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {key.removeprefix(KEY_PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise AdapterError(
            f"{path}: not a whole safetensors file ({error}); copy or train it again"
        ) from error
    tensors = _without_adapter_name(path, stored)
    _refuse_empty(path, tensors)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise AdapterError(f"{path}: {name} holds numbers that are not finite; copy or train it again")
    return tensors


def _without_adapter_name(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {key: match for key in tensors if (match := _NAMED_KEY.fullmatch(key))}
    names = sorted({match[2] for match in found.values()})
    if len(names) > 1:
        raise AdapterError(
            f"{path}: holds several adapters: {', '.join(names)}; save each in a directory of its own"
        )
    return {found[key][1] + found[key][3] if key in found else key: tensors[key] for key in tensors}


def _refuse_empty(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterError(
                f"{path}: {name} is empty: under ZeRO 3 a rank holds but a shard of it; save the adapter "
                "again with its parameters gathered (deepspeed.zero.GatheredParameters)"
            )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{path}: missing; this is no adapter directory") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: not JSON ({error}); the file is damaged") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: not a JSON object; the file is damaged")
    return content


def _peft_config(config: AdapterConfig, names: Iterable[str], base_model: str | None) -> dict[str, Any]:
    is_plain_lora = all(form_named(name).is_mergeable for name in config.methods)
    modules = sorted(name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight"))
    is_a_list = bool(config.every_layer) and isinstance(config.every_layer, tuple) and not config.alternate
    saved = _saved_modules(names)
    # A whole name counts in PEFT whatever layers are chosen.
    chosen = is_a_list and config.layers is not None
    return {
        "peft_type": "LORA" if is_plain_lora else "SSMLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": list(config.every_layer) if is_a_list else modules,
        "layers_to_transform": sorted({_layer_of(module) for module in modules}) if chosen else None,
        "bias": "none",
        "inference_mode": True,
        # In PEFT `norm` would stand for `input_layernorm` too.
        **({"modules_to_save": saved} if saved else {}),
    }


def _saved_modules(names: Iterable[str]) -> list[str]:
    """Paths of the modules that are saved whole, among an adapter's tensors."""
    owners = {name.rpartition(".")[0] for name in names}
    adapted = {owner.rpartition(".")[0] for owner in owners if owner.endswith((".lora_A", ".lora_B"))}
    return sorted(owner for owner in owners - adapted if not _ADAPTED.fullmatch(owner))


def _layer_of(module: str) -> int:
    """The decoder layer in a module's name: its first number, by PEFT's rule."""
    return int(next(part for part in module.split(".") if part.isdecimal()))


def _config_from_peft(
    peft: Mapping[str, Any], tensors: Iterable[str], prefix: str, paths: Paths, source: Path
) -> AdapterConfig:
    if peft.get("peft_type") != "LORA":
        raise AdapterError(
            f"{source}: peft_type is {peft.get('peft_type')!r}; "
            f"without {SETTINGS_FILE} only LORA can be loaded"
        )
    for key, unused in _UNSUPPORTED_PEFT.items():
        if peft.get(key, unused) not in (unused, None):
            raise AdapterError(
                f"{source}: {key} is {peft[key]!r}, which is not supported here; allowed: {unused!r}"
            )
    if str(start := peft.get("init_lora_weights")).startswith(_BASE_CHANGING_STARTS):
        raise AdapterError(
            f"{source}: init_lora_weights is {start!r}, which changes the base model too; "
            "have PEFT convert it to a plain LoRA when saving"
        )
    adapted = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+)\.lora_[AB]\.weight")
    layers: dict[str, set[int]] = {}
    strays = []
    for name in tensors:
        if match := adapted.fullmatch(name):
            layers.setdefault(shortest_name(match[2], paths), set()).add(int(match[1]))
        else:
            strays.append(name)
    saved = tuple(peft.get("modules_to_save") or ())
    modules = [module for module in _saved_modules(strays) if module.endswith(saved)]
    for name in saved:
        if not any(module.endswith(name) for module in modules):
            raise AdapterError(
                f"{source}: modules_to_save names {name!r}, and the weights beside it hold no such module; "
                "save it again with PEFT's `save_pretrained`"
            )
    strays = [name for name in strays if name.rpartition(".")[0] not in modules]
    if strays:
        raise AdapterError(f"{source}: the weights beside it hold {_stray(strays)}")
    placed = _placement_of(layers, paths, source)
    try:
        rank, alpha = int(peft["r"]), float(peft["lora_alpha"])
        return AdapterConfig(
            method="lora",
            rank=rank,
            alpha=alpha,
            rslora=bool(peft.get("use_rslora")),
            dropout=float(peft.get("lora_dropout") or 0.0),
            modules_to_save=tuple(modules),
            **placed,
        )
    except (KeyError, TypeError, ValueError) as error:
        given = ", ".join(f"{key} is {peft.get(key)!r}" for key in ("r", "lora_alpha", "lora_dropout"))
        raise AdapterError(f"{source}: {given}; the file is damaged, or not for this release") from error


def _stray(names: Sequence[str]) -> str:
    """What tensors are that are no LoRA of a decoder layer, and the remedy."""
    for adapted in filter(None, map(_ADAPTED.fullmatch, names)):
        return (
            f"an adapter of {adapted[1]}, which is no linear layer of a decoder layer, and only these are "
            "adapted here; train it again without that in `target_modules`"
        )
    return (
        f"{names[0]}, which is no part of an adapter; save it again with PEFT's `save_pretrained`, and with "
        "`save_embedding_layers=False` where that added an embedding"
    )


def _placement_of(layers: Mapping[str, set[int]], paths: Paths, source: Path) -> dict[str, Any]:
    """`alternate`, `every_layer` and `layers`, or `places`: from the layers that each projection is in."""
    if not layers:
        raise AdapterError(
            f"{source}: holds no LoRA of a decoder layer; it was saved for another kind of model"
        )
    chosen = set().union(*layers.values())
    if beyond := sorted(index for index in chosen if index >= len(paths)):
        raise AdapterError(
            f"{source}: holds an adapter of layer {beyond[0]}; the model has {len(paths)} layers; it was "
            "saved for another model"
        )
    having = {name: {i for i, own in enumerate(paths) if named_by(name, own)} for name in layers}
    # What no layer has is refused where the adapter meets the model.
    every = tuple(name for name, where in layers.items() if where == ((having[name] & chosen) or chosen))
    rest = {name: where for name, where in layers.items() if name not in every}
    alternate = tuple(sorted(rest, key=lambda name: min(rest[name])))
    expected = {name: set(sorted(chosen)[turn :: len(rest)]) for turn, name in enumerate(alternate)}
    if rest != expected:
        # Brought into order where the adapter meets the model.
        return {
            "places": tuple(f"{index}.{name}" for name, where in layers.items() for index in sorted(where))
        }
    is_whole = len(chosen) == len(paths)
    return {
        "alternate": alternate,
        "every_layer": every,
        "layers": None if is_whole else tuple(sorted(chosen)),
    }
