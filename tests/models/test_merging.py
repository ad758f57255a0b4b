"""Plain LoRA merged into its base model: the same logits, and nothing else changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter, save_adapter
from ssmlora_dist.adapters.files import write_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.errors import AdapterError, CheckpointError, ModelError
from ssmlora_dist.models import base_fingerprint, load_model
from ssmlora_dist.models.merging import merge_adapter, merged
from tests.tiny import FAMILY_NAMES, QV_AND_MLP, SEED, randomize_adapters, tiny_model, token_ids

pytestmark = pytest.mark.filterwarnings("ignore")

# Float32: one product in place of three, so that the same terms are added in another order.
LOGITS_TOLERANCE = 2e-5
# Float32 weights: PEFT scales before it adds, as here, but is free to multiply in another order.
WEIGHT_TOLERANCE = 1e-6
LORA = AdapterConfig(
    method="lora", rank=4, alpha=6.0, alternate=("q_proj", "v_proj"), every_layer=("down_proj",)
)
NUM_LAYERS = 3


def saved_base(
    directory: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard_size: str = "4KB",
    **changes: Any,
) -> Path:
    """A base model as transformers saves it, in many shards unless told otherwise."""
    model = tiny_model(model_type, num_layers=NUM_LAYERS, dtype=dtype, **changes)
    model.save_pretrained(directory, max_shard_size=shard_size)
    return directory


def adapted(base: Path, config: AdapterConfig = LORA, dtype: torch.dtype = torch.float32) -> Any:
    """The model in `base` with an adapter that does something."""
    model = add_adapters(load_model(str(base), quantization="none", compute_dtype=dtype), config)
    randomize_adapters(model)
    return model


def adapter_of(model: Any, directory: Path, **settings: Any) -> Path:
    save_adapter(model, directory, **settings)
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_base(tmp_path / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_of(adapted(base), tmp_path / "adapter", base_fingerprint=base_fingerprint(str(base)))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(2, 9), use_cache=False).logits


def loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def weights(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def plainly_merged(weight: Tensor, model: Any, module: str) -> Tensor:
    parameters = adapter_parameters(model)
    a, b = (parameters[f"{module}.lora_{which}.weight"].detach() for which in "AB")
    return weight + LORA.scaling * (b @ a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(SEED)
    print(f"seed {SEED}")
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((8, 6), (2, 6), (8, 2)))
    stored = w.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (stored.to(wide) + 1.5 * (b.to(wide) @ a.to(wide))).to(dtype)
    result = merged(stored, a, b, 1.5)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_merged_model_computes_what_the_adapter_does(model_type: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", model_type)
    model = adapted(base)
    count = merge_adapter(adapter_of(model, tmp_path / "adapter"), tmp_path / "merged")
    assert count == 2 * NUM_LAYERS
    error = (logits(loaded(tmp_path / "merged")) - logits(model)).abs().max().item()
    assert error <= LOGITS_TOLERANCE, f"logits differ by {error:.1e}"
    assert (logits(loaded(base)) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["4KB", "1GB"])
def test_adapted_weights_are_the_plain_sum_and_all_else_is_untouched(
    tied: bool, shard_size: str, tmp_path: Path
) -> None:
    base = saved_base(tmp_path / "base", "qwen2", shard_size=shard_size, tie_word_embeddings=tied)
    model = adapted(base)
    merge_adapter(adapter_of(model, tmp_path / "adapter"), tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert any(name.endswith(".bias") for name in before)
    modules = {name.rpartition(".lora_")[0] for name in adapter_parameters(model)}
    assert len(modules) == 2 * NUM_LAYERS
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        expected = plainly_merged(weight, model, module) if module in modules else weight
        assert torch.equal(after[name], expected), name
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "merged").iterdir()}
    assert (len(list(base.glob("*.safetensors"))) == 1) == (shard_size == "1GB")


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    """Each weight is off by at most half a unit in its last place of 8 bits: all that a logit can lose."""
    base = saved_base(tmp_path / "base", dtype=torch.bfloat16)
    model = adapted(base)
    merge_adapter(adapter_of(model, tmp_path / "adapter"), tmp_path / "merged")
    name = "model.layers.1.self_attn.v_proj.weight"
    weight = weights(base)[name]
    expected = plainly_merged(weight.float(), model, name.removesuffix(".weight")).bfloat16()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weights(tmp_path / "merged")[name], expected)
    assert not torch.equal(expected, weight)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pefts_own_merge_agrees(use_rslora: bool, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(SEED)
    print(f"seed {SEED}")
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["k_proj", "up_proj"], use_rslora=use_rslora, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(loaded(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(base))
    after = weights(tmp_path / "merged")
    changed = {name for name, weight in weights(base).items() if not torch.equal(weight, after[name])}
    assert len(changed) == 2 * NUM_LAYERS
    for name, weight in after.items():
        error = (weight - expected[name]).abs().max().item()
        assert error <= WEIGHT_TOLERANCE, f"{name} differs by {error:.1e}"


def test_ours_merges_in_peft_to_the_same(adapter: Path, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    expected = peft.PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload().state_dict()
    merge_adapter(adapter, tmp_path / "merged")
    for name, weight in weights(tmp_path / "merged").items():
        assert (weight - expected[name]).abs().max() <= WEIGHT_TOLERANCE, name


@pytest.mark.parametrize(
    "settings",
    [
        {"alternate": (), "every_layer": "all-linear"},
        {"alternate": (), "every_layer": ".*_proj", "layers": "-1:"},
        {"places": ("1.q_proj", "0.down_proj")},
    ],
)
def test_a_placement_merges_as_it_was_configured(
    settings: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    config = AdapterConfig(method="lora", rank=4, **settings)
    model = add_adapters(loaded(base), config)
    randomize_adapters(model)
    parameters = adapter_parameters(model)
    # As a run writes it: not resolved.
    write_adapter(tmp_path / "adapter", config, parameters, base={"path": str(base)})
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged") == len(parameters) // 2
    error = (logits(loaded(tmp_path / "merged")) - logits(model)).abs().max().item()
    assert error <= LOGITS_TOLERANCE, f"logits differ by {error:.1e}"


def test_the_tokenizer_comes_along(adapter: Path, base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text('{"version": "1.0"}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "notes.md").write_text("mine")
    merge_adapter(adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert "notes.md" not in names


def test_a_moved_base_is_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="there is no directory"):
        merge_adapter(adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", str(tmp_path / "moved"))
    assert (tmp_path / "merged" / "config.json").exists()


def test_time_modules_are_refused_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(adapted(base, QV_AND_MLP), tmp_path / "adapter")
    shutil.rmtree(base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        AdapterError, match='"ssmlora" cannot be merged: it adds more than a product of input and weight'
    ):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_ssmlora_without_time_modules_is_plain(base: Path, tmp_path: Path) -> None:
    config = AdapterConfig(rank=4, alternate=(), every_layer=("o_proj",))
    model = adapted(base, config)
    assert merge_adapter(adapter_of(model, tmp_path / "adapter"), tmp_path / "merged") == NUM_LAYERS
    assert (logits(loaded(tmp_path / "merged")) - logits(model)).abs().max() <= LOGITS_TOLERANCE


def test_modules_that_are_trained_whole_are_merged(base: Path, tmp_path: Path) -> None:
    names = ("embed_tokens", "norm", "input_layernorm", "lm_head")
    model = adapted(base, LORA.model_copy(update={"modules_to_save": names}))
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_" not in name:
                parameter *= 1.5
    assert merge_adapter(adapter_of(model, tmp_path / "adapter"), tmp_path / "merged") == 3 * NUM_LAYERS + 3
    error = (logits(loaded(tmp_path / "merged")) - logits(model)).abs().max().item()
    assert error <= LOGITS_TOLERANCE, f"logits differ by {error:.1e}"
    tied = saved_base(tmp_path / "tied", tie_word_embeddings=True)
    model = adapted(tied, LORA.model_copy(update={"modules_to_save": ("embed_tokens",)}))
    with pytest.raises(
        AdapterError, match=r"trains model\.embed_tokens, to which the output head .* is tied"
    ):
        merge_adapter(adapter_of(model, tmp_path / "of-tied"), tmp_path / "never")


def test_another_base_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    file = next(iter(sorted(other.glob("*.safetensors"))))
    changed = {name: tensor + 0.5 for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"was trained on another base model than .*; name that one"):
        merge_adapter(adapter, tmp_path / "merged", str(other))


def test_a_base_without_stored_weights_is_refused(adapter: Path, tmp_path: Path) -> None:
    for recorded in ({"path": None}, {"path": None, "init": "random", "config": {"model_type": "llama"}}):
        settings = json.loads((adapter / "ssmlora.json").read_text())
        (adapter / "ssmlora.json").write_text(json.dumps(settings | {"base": recorded}))
        with pytest.raises(AdapterError, match="no stored weights to merge into; name a model with --model"):
            merge_adapter(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            (4, 5),
            r"is \[4, 5\] and \[16, 4\], where the model needs",
        ),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", (16, 3), r"needs rank 4 for 16 -> 16"),
        (
            "model.layers.0.self_attn.q_proj.lora_B.weight",
            None,
            "lacks model.layers.0.self_attn.q_proj.lora_B",
        ),
        ("lm_head.lora_A.weight", (4, 16), "holds lm_head.lora_A.weight, unlike its placement over 3 layers"),
    ],
)
def test_an_adapter_that_does_not_fit(
    name: str, shape: tuple[int, int] | None, message: str, base: Path, tmp_path: Path
) -> None:
    tensors = {key: tensor.detach() for key, tensor in adapter_parameters(adapted(base)).items()}
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.ones(shape)
    write_adapter(tmp_path / "adapter", LORA, tensors, base={"path": str(base)})
    with pytest.raises(AdapterError, match=message):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_index_that_leads_outside_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    shard = next(iter(sorted(base.glob("*.safetensors"))))
    shard.rename(tmp_path / "stray.safetensors")
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../stray.safetensors"))
    with pytest.raises(ModelError, match="which is outside"):
        merge_adapter(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base", "stray.safetensors"}


def test_what_is_there_is_not_overwritten(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with pytest.raises(ModelError, match="exists, and nothing in it is overwritten; choose another --out"):
        merge_adapter(adapter, tmp_path / "merged")


def test_a_full_disk_leaves_nothing_behind(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match="no space left on the device; free some or choose another --out"
    ):
        merge_adapter(adapter, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_a_merged_model_takes_an_adapter_again(adapter: Path, tmp_path: Path) -> None:
    merge_adapter(adapter, tmp_path / "merged")
    model = load_model(str(tmp_path / "merged"), quantization="none", compute_dtype=torch.float32)
    assert not torch.equal(logits(load_adapter(model, adapter)), logits(loaded(tmp_path / "merged")))


def test_a_merged_weight_beyond_the_range_of_its_dtype(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", dtype=torch.float16)
    model = adapted(base, dtype=torch.float16)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.lora_B.weight").fill_(1e6)
    adapter_of(model, tmp_path / "adapter")
    with pytest.raises(
        AdapterError, match=r"layers\.1\.mlp\.down_proj\.weight: .*not finite in torch\.float16"
    ):
        merge_adapter(tmp_path / "adapter", tmp_path / "out", str(base))
    assert not (tmp_path / "out").exists()


def record_ends(adapter: Path, token_ids: list[int]) -> None:
    file = adapter / "ssmlora.json"
    settings = json.loads(file.read_text())
    settings["base"] |= {"end_token_ids": token_ids, "stop_texts": []}
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("own", "recorded", "wanted"),
    [
        ({"eos_token_id": 2, "temperature": 0.6, "top_k": 9}, [2, 5], [2, 5]),
        ({"eos_token_id": [3, 2], "repetition_penalty": 1.1}, [5], [2, 3, 5]),
        ({"max_length": 9}, [5], [5]),
        ({"eos_token_id": [3, 2], "num_beams": 4}, [3], [3, 2]),
        ({"eos_token_id": 2}, None, 2),
    ],
)
def test_answers_of_the_merged_model_end_where_the_adapter_was_trained_to_end_them(
    own: dict[str, Any],
    recorded: list[int] | None,
    wanted: Any,
    adapter: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    (base / "generation_config.json").write_text(json.dumps(own))
    if recorded is not None:
        record_ends(adapter, recorded)
    merge_adapter(adapter, tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings == {**own, "eos_token_id": wanted}
    if recorded is not None:
        ends = loaded(tmp_path / "merged").generation_config.eos_token_id
        assert set(recorded) <= set(ends)


def test_a_model_without_generation_settings_gets_its_own_ends_and_the_adapters(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))
    record_ends(adapter, [5])
    merge_adapter(adapter, tmp_path / "merged")
    assert loaded(tmp_path / "merged").generation_config.eos_token_id == [2, 5]


def test_generation_settings_that_are_damaged_are_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    record_ends(adapter, [5])
    (base / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json: cannot be read as JSON"):
        merge_adapter(adapter, tmp_path / "merged")
