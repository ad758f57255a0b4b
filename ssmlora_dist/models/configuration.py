"""The configuration of a backbone: from its directory, from the hub, or bare."""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.location import CONFIG_FILE, locate
from ssmlora_dist.models.structure import model_class
from ssmlora_dist.rope import RopeParameters, read_rope

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Accepted by transformers for what it stores under another name; and what models read where it is there.
UNLISTED_KEYS = ("rope_theta", "rope_scaling", "torch_dtype", "head_dim")
QUANTIZATION_KEY = "quantization_config"
# Of the ways in which weights are stored quantised, the one that the loader reads: gpt-oss' experts.
READ_QUANTIZATION = "mxfp4"
ROPE = "rope_parameters"
"""The setting of a backbone's RoPE, by transformers' name; so it is recorded with an adapter."""
# Where a configuration notes the setting that it was given.
_GIVEN_ROPE = "ssmlora_rope_parameters"
_ORIGINAL = "original_max_position_embeddings"
# Has what is near alone in view, and needs no longer reach.
_WINDOWED = "sliding_attention"
# Of an adapter's directory, by PEFT's name for it.
ADAPTER_FILE = "adapter_config.json"


def load_config(
    path: str | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    rope_parameters: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """The configuration of a model, without its weights.

    Args:
        path: directory or hub name; not read when `config` is given.
        config: a bare transformers configuration with `model_type`; its keys must be known ones.
        revision: on the hub.
        rope_parameters: a `RopeParameters` in plain values, in place of the model's own; None leaves that.

    Raises:
        ModelError: it cannot be found or read, is not valid, or is of no causal language model; a setting for
            the RoPE of a model that has none.
    """
    if config is not None:
        loaded = _bare_config(config)
    elif path is None:
        raise ModelError("model: name a model in `model.path`, or give its shapes in `model.config`")
    else:
        loaded = read_config(locate(path, revision, weights=False))
        loaded.name_or_path = path
    if rope_parameters is not None:
        _scale_rope(loaded, read_rope(rope_parameters, f"model.{ROPE}"))
    return loaded


def stored_quantization(path: str, revision: str | None = None) -> str | None:
    """How weights of a model are stored quantised, by transformers' name; None: they are not.

    Args:
        path: directory or hub name.
        revision: on the hub.

    Raises:
        ModelError: as for `load_config`.
    """
    stored = _read_values(locate(path, revision, weights=False)).get(QUANTIZATION_KEY)
    return None if stored is None else READ_QUANTIZATION


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration in `directory`; errors as for `load_config`."""
    return _build(_read_values(directory), str(directory / CONFIG_FILE))


def _read_values(directory: Path) -> dict[str, Any]:
    """The configuration as it is written; refuses one of weights that cannot be read."""
    file = directory / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if (directory / ADAPTER_FILE).is_file():
            raise ModelError(
                f"{directory}: holds an adapter, not a model; name its base model, and load the adapter into "
                "that (`load_adapter`)"
            ) from error
        raise ModelError(f"{directory}: holds no {CONFIG_FILE}, so it is not a model's directory") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error}); fetch the file again") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(f"{file}: names no `model_type`, so it is not the configuration of a model")
    stored = values.get(QUANTIZATION_KEY)
    if stored is not None and not (
        isinstance(stored, dict) and stored.get("quant_method") == READ_QUANTIZATION
    ):
        raise ModelError(
            f"{file}: the weights are stored quantised; name the original model, it is quantised while it is "
            "loaded as `quantization.mode` says"
        )
    return values


def given_rope(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The setting that `load_config` was given; None: the RoPE is the model's own."""
    return getattr(config, _GIVEN_ROPE, None)


def has_rope(config: PreTrainedConfig, setting: Mapping[str, Any] | None) -> bool:
    """Whether a model's RoPE is as a recorded setting says, whoever has given it; None: it is its own."""
    if setting is None:
        return given_rope(config) is None
    found = getattr(config.get_text_config(), ROPE, None) or {}
    return all(setting.items() <= own.items() for own in _scaled(found))


def reaching_factor(config: PreTrainedConfig, length: int) -> int | None:
    """The `factor` of a setting that reaches `length` positions; None for a model without RoPE."""
    text_config = config.get_text_config()
    found = getattr(text_config, ROPE, None)
    if not found:
        return None
    return math.ceil(length / _original_positions(text_config, _scaled(found)[0]))


def _scale_rope(config: PreTrainedConfig, setting: RopeParameters) -> None:
    """Puts a setting in the place of the model's own, in place."""
    text_config = config.get_text_config()
    found = getattr(text_config, ROPE, None)
    if not found:
        raise ModelError(
            f"model.{ROPE}: given, and {config.model_type} models have no RoPE in transformers: their "
            "positions are learnt, or they have none; remove it, or name another model"
        )
    for kind in _scaled_kinds(found):
        own = found[kind] if kind else found
        scaled = {
            key: value for key, value in own.items() if key not in (*RopeParameters.model_fields, "type")
        }
        # Of linear scaling transformers asks for no such key: it says how far this reaches.
        scaled |= {"rope_theta": own["rope_theta"], _ORIGINAL: _original_positions(text_config, own)}
        scaled |= setting.given
        found = {**found, kind: scaled} if kind else scaled
        if hasattr(text_config, _ORIGINAL):
            # Of these models transformers takes it from here.
            setattr(text_config, _ORIGINAL, scaled[_ORIGINAL])
    setattr(text_config, ROPE, found)
    setattr(config, _GIVEN_ROPE, setting.given)
    trial: Any = copy.copy(text_config)
    trial.max_position_embeddings = max_positions(config)
    if setting.rope_type == "linear":
        trial.ignore_keys_at_rope_validation = {*text_config.ignore_keys_at_rope_validation, _ORIGINAL}
    try:
        trial.validate_rope()
    except ValueError as error:
        raise ModelError(
            f"model.{ROPE}: not for {config.model_type} models in transformers: {error}"
        ) from error


def _scaled_kinds(rope: Mapping[str, Any]) -> list[str]:
    """Kinds of layers that have a RoPE of their own and are scaled; "" where all have one and the same."""
    kinds = [kind for kind, value in rope.items() if isinstance(value, dict)]
    return [kind for kind in kinds if kind != _WINDOWED] or kinds or [""]


def _scaled(rope: dict[str, Any]) -> list[dict[str, Any]]:
    return [rope[kind] if kind else rope for kind in _scaled_kinds(rope)]


def _original_positions(text_config: Any, own: Mapping[str, Any]) -> int:
    """Those that the model was trained on, before any scaling."""
    positions: int = own.get(_ORIGINAL) or text_config.max_position_embeddings
    return positions


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest input in tokens that a model is made for; None where it has no limit.

    With a scaled RoPE `max_position_embeddings` counts the positions before scaling in some models and those
    after it in others. The limit is the wider reading: of linear scaling the positions times the factor; of
    yarn, llama3 and longrope, which record what was scaled, the factor times that, or the positions where
    these are more. Dynamic scaling is left out: beyond the positions its frequencies follow the longest input
    seen so far. Where kinds of layers are scaled differently the least counts, of a setting that was given
    what it scales.
    """
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, ROPE, None) or {}
    if positions is None:
        return None
    if given_rope(config):
        return min(int(own[_ORIGINAL] * own["factor"]) for own in _scaled(rope))
    by_layer = [value for value in rope.values() if isinstance(value, dict)]
    return min(_scaled_positions(positions, scaling) for scaling in by_layer or [rope])


def _scaled_positions(positions: int, scaling: Mapping[str, Any]) -> int:
    factor = scaling.get("factor") or 1.0
    if scaling.get("rope_type") == "linear":
        return int(positions * factor)
    return max(positions, int((scaling.get(_ORIGINAL) or 0) * factor))


def _bare_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    if "model_type" not in values:
        raise ModelError('model.config: `model_type` is missing; give one, such as "llama"')
    _check_model_type(values["model_type"], "model.config")
    from transformers import AutoConfig

    default = AutoConfig.for_model(values["model_type"])
    known = [*default.to_dict(), *default.attribute_map, *UNLISTED_KEYS]
    unknown = [key for key in values if key not in known and (key, values[key]) != (QUANTIZATION_KEY, None)]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
        raise ModelError(
            f"model.config: a {values['model_type']} configuration has no key {', '.join(unknown)}{hint}"
        )
    return _build(values, "model.config")


def _build(values: Mapping[str, Any], where: str) -> PreTrainedConfig:
    _check_model_type(values["model_type"], where)
    from transformers import AutoConfig

    # What is null is none, and would make transformers take the model for a quantised one.
    rest = {key: value for key, value in values.items() if key not in ("model_type", QUANTIZATION_KEY)}
    try:
        config = AutoConfig.for_model(values["model_type"], **rest)
    # transformers raises whatever its validators raise: type and value errors, and strict dataclass errors.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{where}: not a valid {values['model_type']} configuration: {reason}") from error
    model_class(config)
    text_config = config.get_text_config()
    padding = getattr(text_config, "pad_token_id", None)
    if padding is not None and padding >= text_config.vocab_size:
        raise ModelError(
            f"{where}: `pad_token_id` is {padding}, which a model of `vocab_size` "
            f"{text_config.vocab_size} does not have; set it to null or to a smaller id"
        )
    return config


def _check_model_type(model_type: object, where: str) -> None:
    from transformers import CONFIG_MAPPING, __version__

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        nearest = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        hint = f"did you mean {nearest[0]!r}? Else " if nearest else ""
        raise ModelError(
            f"{where}: transformers {__version__} knows no model type {model_type!r}; {hint}install a "
            "release that knows it"
        )
