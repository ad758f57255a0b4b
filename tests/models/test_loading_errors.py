"""What cannot be loaded gives one ModelError that names the place and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_model
from ssmlora_dist.models.weights import SafetensorsWeights


def test_pretrained_weights_need_a_path(tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"model\.path"):
        load_model(config=tiny_config("llama"))
    with pytest.raises(ModelError, match=r"model\.path"):
        load_model()


def test_weights_stored_as_pickle(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: .*pickle.*save_pretrained"):
        load_model(str(single))


def test_no_weights_at_all(single: Path) -> None:
    (single / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no safetensors weights"):
        load_model(str(single))


def test_a_missing_tensor(single: Path, rewrite: Callable[..., None]) -> None:
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight;"):
        load_model(str(single))


def test_a_tensor_of_another_shape(single: Path, rewrite: Callable[..., None]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(single, lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()}))
    with pytest.raises(
        ModelError, match=r"model\.safetensors: model\.layers\.0\.mlp\.down_proj.*\[32, 63\].*\[32, 64\]"
    ):
        load_model(str(single))


def test_a_tensor_that_is_already_quantised(single: Path, rewrite: Callable[..., None]) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(single, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ModelError, match=r"down_proj\.weight is stored as I8"):
        load_model(str(single))


def test_a_truncated_file(single: Path) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read.*download it again"):
        load_model(str(single))


def test_a_file_damaged_after_the_check(single: Path) -> None:
    weights = SafetensorsWeights(single)
    (single / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read while reading lm_head\.weight"):
        weights.read(
            "lm_head.weight", shape=torch.Size([67, 32]), device=torch.device("cpu"), dtype=torch.float32
        )


def test_a_missing_shard(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    lost = sorted(directory.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=f"{lost.name}: missing.*index"):
        load_model(str(directory))


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_a_broken_index(content: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load_model(str(directory))


def test_an_index_that_names_the_wrong_shard(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, last = sorted(set(content["weight_map"].values()))[:: len(set(content["weight_map"].values())) - 1]
    name = next(name for name, file in content["weight_map"].items() if file == first)
    content["weight_map"][name] = last
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=f"{last}: lacks {name}"):
        load_model(str(directory))
