"""The fingerprint of a base model: what it must and must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import base_fingerprint


def test_sharding_and_place_do_not_show(
    save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded, single = save_checkpoint("llama"), save_checkpoint("llama", max_shard_size="1GB")
    fingerprint = base_fingerprint(str(sharded))
    assert len(fingerprint) == 64
    assert base_fingerprint(str(single)) == fingerprint
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(single))
    assert base_fingerprint("someone/some-model") == fingerprint


def test_families_dtypes_and_sizes_show(
    checkpoints: dict[str, Path], save_checkpoint: Callable[..., Path]
) -> None:
    directories = [
        *checkpoints.values(),
        save_checkpoint("llama", torch.bfloat16),
        save_checkpoint("llama", num_hidden_layers=1),
    ]
    assert len({base_fingerprint(str(directory)) for directory in directories}) == len(directories)


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_changed_weight_shows(name: str, position: int, save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("llama", max_shard_size="1GB")
    before = base_fingerprint(str(directory))
    file = directory / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].view(-1)[position] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert base_fingerprint(str(directory)) != before


def test_heads_show_though_the_weights_are_the_same(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("llama")
    before = base_fingerprint(str(directory))
    config = directory / "config.json"
    changed = config.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": 2')
    config.write_text(changed.replace('"head_dim": 8', '"head_dim": 16'))
    assert base_fingerprint(str(directory)) != before


def test_random_models_differ_by_seed_and_shape(tiny_config: Callable[..., dict[str, Any]]) -> None:
    def fingerprint(seed: int, **changes: Any) -> str:
        return base_fingerprint(init="random", config=tiny_config("llama", **changes), seed=seed)

    assert fingerprint(0) == fingerprint(0)
    different = {fingerprint(0), fingerprint(1), fingerprint(0, vocab_size=68), fingerprint(0, head_dim=16)}
    different.add(fingerprint(0, initializer_range=0.1))
    assert len(different) == 5


def test_a_model_without_weights_has_none(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("llama", max_shard_size="1GB")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        base_fingerprint(str(directory))
