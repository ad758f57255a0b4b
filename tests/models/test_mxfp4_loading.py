"""Experts that are stored in MXFP4, as gpt-oss' are, read and quantised anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.configuration import load_config, stored_quantization
from ssmlora_dist.models.loading import load_model
from ssmlora_dist.quantization import dequantized_weight, is_quantized
from tests.quantization.test_mxfp4 import packed

WEIGHTS = "model.safetensors"
PACKED = ("gate_up_proj", "down_proj")
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def stored(save_checkpoint: Callable[..., Path]) -> Path:
    """A gpt-oss as it is published: experts in MXFP4, all else in bfloat16."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    directory = save_checkpoint("gpt_oss", torch.bfloat16, max_shard_size="1GB", **sizes)
    tensors = load_file(directory / WEIGHTS)
    for seed, name in enumerate([name for name in tensors if name.endswith(PACKED)]):
        num_experts, num_inputs, num_outputs = tensors.pop(name).shape
        blocks, scales = packed(num_experts, num_outputs, num_inputs // 32, seed)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    file = directory / "config.json"
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization}))
    return directory


def loaded(directory: Path, mode: Any) -> Any:
    return load_model(str(directory), quantization=mode, compute_dtype=torch.bfloat16)


def changed(stored: Path, directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(stored / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / "config.json").write_bytes((stored / "config.json").read_bytes())
    return directory


def test_the_model_is_that_of_transformers(stored: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    expected = AutoModelForCausalLM.from_pretrained(
        stored, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    found = loaded(stored, "none")
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected.eval()(tokens).logits)


def test_experts_become_nf4(stored: Path) -> None:
    dense, quantized = (loaded(stored, mode).get_submodule(EXPERTS) for mode in ("none", "nf4"))
    assert is_quantized(quantized)
    for name in PACKED:
        found, exact = dequantized_weight(quantized, name).float(), dense.get_parameter(name).float()
        # NF4's values lie nowhere more than 0.31 apart, in units of a block's largest.
        assert (found - exact).abs().max() <= 0.16 * exact.abs().max()
        assert not torch.equal(found, exact)


def test_it_is_known_how_they_are_stored(stored: Path) -> None:
    assert stored_quantization(str(stored)) == "mxfp4"
    assert not hasattr(load_config(str(stored)), "quantization_config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda all_: all_.pop(f"{EXPERTS}.down_proj_scales"),
            rf"the weights lack {EXPERTS}\.down_proj_scales",
        ),
        (
            lambda all_: all_.update({f"{EXPERTS}.down_proj_scales": torch.ones(4, 32, 3).byte()}),
            r"scales is U8 \[4, 32, 3\], where MXFP4 weights of the shape \[4, 64, 32\] .* U8 \[4, 32, 2\]",
        ),
        (
            lambda all_: all_.update({f"{EXPERTS}.down_proj_blocks": torch.ones(4, 32, 2, 16)}),
            r"down_proj_blocks is F32 .* stored as U8",
        ),
        (
            lambda all_: all_[f"{EXPERTS}.down_proj_scales"].fill_(255),
            "beyond the range of torch.bfloat16.*fetch the model again",
        ),
        (lambda all_: all_.pop("model.norm.weight"), r"lack model\.norm\.weight; .*not of one model"),
        (
            lambda all_: all_.update({"model.norm.weight": torch.ones(32).byte()}),
            r"model\.norm\.weight is stored as U8: the weights are stored quantised",
        ),
    ],
    ids=["no scales", "shape", "dtype", "too large", "missing", "other codes"],
)
def test_damaged_checkpoints_are_refused(
    stored: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        loaded(changed(stored, tmp_path, change), "nf4")
