"""Weights stored in other pieces than the model has them: what is made of them, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter

from ssmlora_dist import AdapterConfig, add_adapters, save_adapter
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_model
from ssmlora_dist.models.merging import merge_adapter
from ssmlora_dist.models.safetensors_file import StoredTensor
from ssmlora_dist.models.stage import StageLayers
from tests.decoders import bare_config
from tests.tiny import SEED, randomize_adapters, token_ids

WEIGHTS = "model.safetensors"
NUM_EXPERTS = 4
FLOAT32: dict[str, Any] = {"quantization": "none", "compute_dtype": torch.float32}


def saved(directory: Path, model_type: str, **changes: Any) -> Path:
    """As transformers stores it: the experts one by one."""
    config = bare_config(model_type) | changes
    load_model(init="random", config=config, **FLOAT32, seed=SEED).save_pretrained(directory)
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def expected(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32
    ).state_dict()
    return found


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_are_merged_with_no_more_in_memory_than_one_tensor_needs(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path, model_type)
    assert sum(".experts.1." in name for name in load_file(directory / WEIGHTS)) == 4 * 3
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, read = 0, StoredTensor.read

    def noted(self: StoredTensor, rows: range | None = None) -> Tensor:
        nonlocal most
        tensor = read(self, rows)
        if ".experts." in self.name:
            alive.add(tensor)
            most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", noted)
    gc.disable()
    try:
        model = load_model(str(directory), **FLOAT32)
    finally:
        gc.enable()
    # Gates and ups of one layer.
    assert most == 2 * NUM_EXPERTS
    assert_same(model.state_dict(), expected(directory))


def test_a_stage_reads_the_experts_of_its_own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, names, read = saved(tmp_path, "olmoe"), set(), StoredTensor.read

    def noted(self: StoredTensor, rows: range | None = None) -> Tensor:
        names.add(self.name)
        return read(self, rows)

    monkeypatch.setattr(StoredTensor, "read", noted)
    load_model(str(directory), **FLOAT32, stage=StageLayers(1, 3, 4))
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {"1", "2"}
    assert sum(".experts." in name for name in names) == 2 * 3 * NUM_EXPERTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            r"layers\.1\.mlp\.experts\.gate_up_proj is made of 7 stored tensors .*Merge.* fails: .*fetch",
        ),
        (
            lambda tensors: [
                tensors.pop(f"model.layers.1.mlp.experts.3.{n}_proj.weight") for n in ("up", "gate")
            ],
            r"gate_up_proj is made of 6 .*gives the shape \[3, 16, 16\], where \[4, 16, 16\] is needed",
        ),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1.mlp.experts" in name],
            r"lack model\.layers\.1\.mlp\.experts\.gate_up_proj",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.experts.0.bias_proj.weight": torch.ones(2)}),
            r"what `config\.json` has no place for: model\.layers\.1\.mlp\.experts\.0\.bias_proj",
        ),
    ],
    ids=["one tensor", "one expert", "all experts", "one too many"],
)
def test_what_cannot_be_converted_is_refused_before_anything_is_read(
    change: Callable[[Any], Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path, "qwen3_moe")
    rewrite(directory, change)
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ModelError, match=message):
        load_model(str(directory), **FLOAT32)


def fuse(tensors: dict[str, Tensor]) -> None:
    for layer in range(4):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [tensors.pop(f"{prefix}{name}_proj.weight") for name in "qkv"]
        tensors[f"{prefix}qkv.weight"] = torch.cat(parts)


class Unknown(ConversionOps):
    """Of a later release."""

    def convert(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such conversion")


def convert_with(operation: ConversionOps, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    mapping = {"llama": [WeightConverter("self_attn.qkv.weight", names, [operation])], "legacy": []}
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", mapping)


def test_one_stored_tensor_can_make_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved(tmp_path, "llama", num_key_value_heads=2)
    wanted = expected(directory)
    rewrite(directory, fuse)
    convert_with(Chunk(dim=0), monkeypatch)
    assert_same(load_model(str(directory), **FLOAT32).state_dict(), wanted)


def test_an_operation_that_fails_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = saved(tmp_path, "llama", num_key_value_heads=2)
    rewrite(directory, fuse)
    convert_with(Unknown(), monkeypatch)
    with pytest.raises(
        ModelError, match=r"qkv\.weight, \.\.\.\) by transformers' Unknown, which fails: no such"
    ):
        load_model(str(directory), **FLOAT32)


def test_an_adapter_is_merged_beside_experts(tmp_path: Path) -> None:
    directory = saved(tmp_path / "base", "qwen3_moe")
    model = load_model(str(directory), **FLOAT32)
    add_adapters(model, AdapterConfig(method="lora", rank=2, every_layer=("o_proj",)))
    randomize_adapters(model)
    model.config.name_or_path = str(directory)
    save_adapter(model, tmp_path / "adapter")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged") == 8
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        found, wanted = (each(token_ids(1, 9), use_cache=False).logits for each in (merged, model))
    # Float32, one product in place of three.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
