"""What cannot be loaded gives one ModelError that names the place and the remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import base_fingerprint, load_config, load_model
from ssmlora_dist.models.stage import StageLayers
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


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
    ],
    ids=["compiled", "wrapped"],
)
def test_tensors_under_other_names(
    renamed: Callable[[str], str], single: Path, rewrite: Callable[..., None]
) -> None:
    """They are all there, so nothing was left out of a download."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[renamed(name)] = tensors.pop(name)

    names = load_file(single / "model.safetensors").keys()
    first = min(renamed(name) for name in names if renamed(name) != name)
    rewrite(single, rename)
    with pytest.raises(ModelError, match=rf"lack .*; they hold instead {re.escape(first)}.*; save the model"):
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


def test_a_null_quantization_config_is_none(single: Path) -> None:
    file = single / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": None}))
    model = load_model(str(single), quantization="none")
    assert not hasattr(model.config, "quantization_config")
    assert load_config(config={"model_type": "llama", "quantization_config": None}).model_type == "llama"


UNREAD = {
    "a bias": ("model.layers.0.self_attn.q_proj.bias", "attention_bias"),
    "another bias": ("model.layers.1.mlp.up_proj.bias", "mlp_bias"),
    "a layer": ("model.layers.2.mlp.up_proj.weight", "num_hidden_layers"),
    "a norm": ("model.layers.0.self_attn.q_norm.weight", "model_type"),
    "a head": ("score.weight", "model_type"),
}


@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.parametrize("stage", [None, StageLayers(0, 1, 2), StageLayers(1, 2, 2)])
def test_a_tensor_that_nobody_reads(
    case: str, stage: StageLayers | None, single: Path, rewrite: Callable[..., None]
) -> None:
    name, setting = UNREAD[case]
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(3)}))
    with pytest.raises(ModelError, match=rf"no place for: {re.escape(name)}; .*`{setting}`"):
        load_model(str(single), stage=stage)


def test_a_tensor_that_the_index_leaves_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoints["llama"], tmp_path / "copy")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    lost = "model.layers.0.self_attn.q_proj.bias"
    shard = directory / content["weight_map"]["model.embed_tokens.weight"]
    save_file(load_file(shard) | {lost: torch.zeros(32)}, shard)
    with pytest.raises(ModelError, match=rf"{shard.name}: holds {re.escape(lost)}, which .*index"):
        load_model(str(directory))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.1.self_attn.masked_bias",
        "model.rotary_emb.original_inv_freq",
    ],
)
def test_buffers_that_are_computed_may_be_stored(
    name: str, single: Path, rewrite: Callable[..., None]
) -> None:
    rewrite(single, lambda tensors: tensors.update({name: torch.zeros(3)}))
    load_model(str(single))


def test_what_the_class_of_the_model_ignores_may_be_stored(
    single: Path, rewrite: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    rewrite(single, lambda tensors: tensors.update({"mtp.layers.0.eh_proj.weight": torch.zeros(3)}))
    with pytest.raises(ModelError, match=r"mtp\.layers"):
        load_model(str(single))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    load_model(str(single))


QUANTISED = {
    "bitsandbytes": {".weight": (torch.uint8, (1024, 1)), ".weight.absmax": (torch.float32, (32,))},
    "bitsandbytes in 8 bits": {".weight": (torch.int8, (32, 64)), ".SCB": (torch.float32, (32,))},
    "GPTQ": {".qweight": (torch.int32, (8, 32)), ".qzeros": (torch.int32, (1, 4))},
    "FP8": {".weight": (torch.float8_e4m3fn, (32, 64)), ".weight_scale_inv": (torch.float32, (1, 1))},
    "compressed-tensors": {".weight_packed": (torch.int32, (32, 8)), ".weight_shape": (torch.int64, (2,))},
    "unknown scheme": {".weight_in_3_bits": (torch.uint8, (32, 24))},
}


@pytest.mark.parametrize(
    ("scheme", "reader"),
    # Names alone do not tell everything to the fingerprint, which takes a part of any dtype.
    [(scheme, load_model) for scheme in QUANTISED]
    + [(scheme, base_fingerprint) for scheme in list(QUANTISED)[:-1]],
)
def test_weights_stored_quantised_without_saying_so(
    scheme: str, reader: Callable[[str], Any], single: Path, rewrite: Callable[..., None]
) -> None:
    prefix = "model.layers.0.mlp.down_proj"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{prefix}.weight"]
        tensors.update({prefix + end: torch.zeros(*shape).to(dtype) for end, (dtype, shape) in new.items()})

    new = QUANTISED[scheme]
    rewrite(single, quantise)
    with pytest.raises(ModelError, match=r"down_proj.*stored quantised.*name the original"):
        reader(str(single))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite(
    name: str, value: float, single: Path, rewrite: Callable[..., None]
) -> None:
    rewrite(single, lambda tensors: tensors[name].view(-1)[5:6].fill_(value))
    with pytest.raises(ModelError, match=rf"model\.safetensors: {re.escape(name)} holds .* not finite"):
        load_model(str(single))


def test_weights_beyond_the_range_of_the_compute_dtype(single: Path, rewrite: Callable[..., None]) -> None:
    rewrite(single, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    load_model(str(single), compute_dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"model\.norm\.weight .*beyond .*float16"):
        load_model(str(single), compute_dtype=torch.float16)


def test_tied_weights_that_are_not_finite(
    save_checkpoint: Callable[..., Path], rewrite: Callable[..., None]
) -> None:
    directory = save_checkpoint("llama", max_shard_size="1GB", tie_word_embeddings=True)
    broken = torch.full((67, 32), torch.nan)
    rewrite(
        directory,
        lambda t: t.update({"model.embed_tokens.weight": broken, "lm_head.weight": broken.clone()}),
    )
    with pytest.raises(ModelError, match=r"embed_tokens\.weight holds .* not finite"):
        load_model(str(directory))
