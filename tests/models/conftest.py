"""Tiny checkpoints of every supported family, as transformers itself saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import FAMILY_NAMES

SEED = 7


def _tiny_config(model_type: str, **changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 67,
        "max_position_embeddings": 128,
        "pad_token_id": 3,
    }
    if model_type == "qwen2":
        del sizes["head_dim"]
    return sizes | changes


@pytest.fixture
def tiny_config() -> Callable[..., dict[str, Any]]:
    """Makes the configuration of a model of some 20,000 weights, with changes."""
    return _tiny_config


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model of random weights, norms and biases included, in shards, and returns the directory."""

    def save(
        model_type: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "40KB", **changes: Any
    ) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        print(f"seed {SEED}")
        generator = torch.Generator().manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**_tiny_config(model_type, **changes)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2, generator=generator)
        directory = tmp_path_factory.mktemp(model_type)
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return save


@pytest.fixture(scope="session")
def checkpoints(save_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """A sharded float32 checkpoint of each family."""
    return {model_type: save_checkpoint(model_type) for model_type in FAMILY_NAMES}


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Two rows of nine tokens."""
    return torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(SEED))


@pytest.fixture
def single(save_checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint in one file, to be changed by the test."""
    return save_checkpoint("llama", max_shard_size="1GB")


@pytest.fixture
def rewrite() -> Callable[..., None]:
    """Applies a function to the dictionary of tensors of a single-file checkpoint."""

    def apply(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        from safetensors.torch import load_file, save_file

        # Copies: a loaded tensor is a view of the file that is about to be replaced.
        tensors = {
            name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()
        }
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return apply
