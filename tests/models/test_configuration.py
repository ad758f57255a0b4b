"""Configurations from a directory or bare, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_config, max_positions
from tests.tiny import FAMILY_NAMES


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_a_directory_gives_what_transformers_reads(model_type: str, checkpoints: dict[str, Path]) -> None:
    from transformers import AutoConfig

    directory = checkpoints[model_type]
    assert load_config(str(directory)).to_dict() == AutoConfig.from_pretrained(directory).to_dict()


def test_a_bare_configuration_is_completed_with_the_family_defaults(
    tiny_config: Callable[..., dict[str, Any]],
) -> None:
    config = load_config(config=tiny_config("gemma2"))
    assert config.hidden_size == 32
    assert config.attn_logit_softcapping == 50.0


def test_what_transformers_renames_is_accepted(tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = load_config(config=tiny_config("llama", rope_theta=500000.0, torch_dtype="float32"))
    assert config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 32}, r"model\.config: a llama configuration has no key hiden_size; .*`hidden_size`"),
        ({"hidden_size": "32"}, r"model\.config: not a valid llama configuration: .*hidden_size"),
        ({"hidden_size": 33}, r"model\.config: not a valid llama configuration: .*33"),
        ({"model_type": "lama"}, r"model\.config: .*no model type 'lama'; did you mean 'llama'\?"),
        ({"model_type": ["llama"]}, "no model type"),
    ],
)
def test_a_bad_bare_configuration(
    changes: dict[str, Any], message: str, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    config = tiny_config("llama") | changes
    with pytest.raises(ModelError, match=message):
        load_config(config=config)


def test_a_bare_configuration_without_type_or_nothing_at_all() -> None:
    with pytest.raises(ModelError, match="`model_type` is missing"):
        load_config(config={"hidden_size": 32})
    with pytest.raises(ModelError, match=r"model\.path.*model\.config"):
        load_config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json"),
        ("{", r"config\.json: cannot be read as JSON"),
        ("[]", r"config\.json: names no `model_type`"),
        ('{"hidden_size": 32}', r"config\.json: names no `model_type`"),
        ('{"model_type": "clip"}', "no causal language model of the type 'clip'"),
        ('{"model_type": "llamma"}', r"config\.json: .*no model type 'llamma'; did you mean 'llama'\?"),
        ('{"model_type": "llama", "hidden_size": 33}', r"config\.json: not a valid llama configuration"),
    ],
)
def test_a_bad_directory(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        load_config(str(tmp_path))


def test_the_directory_of_an_adapter_is_not_one_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds an adapter.*name its base model.*`load_adapter`"):
        load_config(str(tmp_path))


def test_quantised_checkpoints_are_refused(
    tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    config = tiny_config("llama", quantization_config={"quant_method": "gptq"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="stored quantised; name the original model"):
        load_config(str(tmp_path))


YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("rope", "positions", "expected"),
    [
        ({}, 128, 128),
        ({"rope_type": "default"}, 128, 128),
        # The positions are those before scaling.
        ({"rope_type": "linear", "factor": 2.0}, 128, 256),
        ({"type": "linear", "factor": 2.5}, 128, 320),
        # Beyond them the frequencies follow the longest input seen so far.
        ({"rope_type": "dynamic", "factor": 2.0}, 128, 128),
        (YARN, 128, 512),
        (YARN | {"original_max_position_embeddings": 128}, 128, 512),
        # They are those after scaling.
        (YARN | {"original_max_position_embeddings": 32}, 128, 128),
        (LLAMA3 | {"original_max_position_embeddings": 8}, 128, 128),
        (LLAMA3 | {"original_max_position_embeddings": 32}, 32, 256),
        (LONGROPE | {"original_max_position_embeddings": 32}, 128, 128),
        (LONGROPE | {"original_max_position_embeddings": 32, "factor": 8.0}, 32, 256),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_positions_of_a_model(
    rope: dict[str, Any], positions: int, expected: int, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    values = tiny_config("llama", max_position_embeddings=positions)
    assert max_positions(load_config(config=values | ({"rope_scaling": rope} if rope else {}))) == expected


def test_positions_that_differ_by_layer_and_none_at_all() -> None:
    from transformers import AutoConfig

    by_layer = AutoConfig.for_model("gemma3_text", max_position_embeddings=128)
    by_layer.rope_parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert max_positions(by_layer) == 128
    assert max_positions(AutoConfig.for_model("mamba")) is None


def test_a_padding_token_that_the_model_does_not_have(tiny_config: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ModelError, match=r"`pad_token_id` is 67, .*`vocab_size` 67"):
        load_config(config=tiny_config("llama", pad_token_id=67))
