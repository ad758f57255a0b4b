"""Models and tokenizers from what configurations and adapter directories say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters, save_adapter
from ssmlora_dist.config.build import attention_of, build_tokenizer, check_model, load_trained, shapes_of
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import AdapterError, ConfigError, ModelError
from ssmlora_dist.models import load_model
from ssmlora_dist.models import loading as loading_module
from ssmlora_dist.quantization import is_quantized
from tests.decoders import bare_config
from tests.tiny import layers_of, randomize_adapters, tiny_config, tiny_model, token_ids

LORA = AdapterConfig(method="lora", rank=4, alternate=("q_proj", "v_proj"))
NUM_LAYERS = 2


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids(2, 9), use_cache=False).logits
        return found


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A bfloat16 model with a tokenizer."""
    from tests.models.test_tokenizer import save_word_tokenizer

    model = tiny_model(num_layers=NUM_LAYERS, dtype=torch.bfloat16, hidden_size=32, intermediate_size=64)
    model.save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base", eos_token="</s>")
    return tmp_path / "base"


def public_adapter(base: Path, out: Path, **load: Any) -> Any:
    """Saved by the public interface; returns the model that it was trained on."""
    model = add_adapters(load_model(str(base), **load), LORA)
    randomize_adapters(model)
    save_adapter(model, out)
    return model


@pytest.mark.parametrize(
    "load",
    [
        {"quantization": "none", "compute_dtype": torch.float32},
        {"quantization": "none", "compute_dtype": torch.bfloat16},
        {"quantization": "nf4", "compute_dtype": torch.float32, "double_quantization": False},
        {"quantization": "fp4", "compute_dtype": torch.bfloat16},
        {"quantization": "int8", "compute_dtype": torch.float32},
    ],
    ids=lambda load: f"{load['quantization']}-{load['compute_dtype']}",
)
def test_an_adapter_comes_back_on_what_it_was_trained_on(
    load: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model = public_adapter(base, tmp_path / "adapter", **load)
    warnings: list[str] = []
    loaded, _ = load_trained(tmp_path / "adapter", warn=warnings.append)
    assert torch.equal(logits(loaded), logits(model))
    assert warnings == []


def test_quantised_layers_of_transformers_are_recorded(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    save_adapter(add_adapters(model, LORA), tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / "ssmlora.json").read_text())["base"]
    assert recorded == {
        "path": str(base),
        "rope_parameters": None,
        "quantization": "fp4",
        "double_quantization": True,
        "compute_dtype": "float32",
    }


def peft_adapter(base: Path, out: Path) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(out)
    return adapted.eval()


def forget_precision(directory: Path) -> None:
    file = directory / "ssmlora.json"
    settings = json.loads(file.read_text())
    settings["base"] = {"path": settings["base"]["path"]}
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("of_peft", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_where_it_is_not_known_the_base_is_loaded_in_full_precision_and_that_is_said(
    of_peft: bool, base: Path, tmp_path: Path
) -> None:
    adapter, warnings = tmp_path / "adapter", list[str]()
    if of_peft:
        saved = peft_adapter(base, adapter)
    else:
        saved = public_adapter(base, adapter, quantization="none", compute_dtype=torch.bfloat16)
        forget_precision(adapter)
    model, _ = load_trained(adapter, warn=warnings.append)
    assert not any(map(is_quantized, model.modules()))
    assert model.dtype == torch.bfloat16
    # In float32, because PEFT adds its delta in another order.
    torch.testing.assert_close(logits(model.float()), logits(saved.float()), rtol=0, atol=1e-5)
    [warning] = warnings
    assert warning.startswith(f"{adapter}: does not record")
    assert "quantization none and dtype bfloat16" in warning
    assert "--quantization" in warning
    assert "--dtype" in warning


@pytest.mark.filterwarnings("ignore")
def test_another_precision_can_be_asked_for(base: Path, tmp_path: Path) -> None:
    peft_adapter(base, tmp_path / "adapter")
    warnings: list[str] = []
    model, _ = load_trained(tmp_path / "adapter", quantization="nf4", dtype="float32", warn=warnings.append)
    assert is_quantized(layers_of(model)[0].mlp.up_proj)
    assert model.dtype == torch.float32
    assert warnings == []


def test_a_base_model_that_is_gone_is_named_with_the_option(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    public_adapter(base, adapter)
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(
        ModelError, match=rf"^--model \(by default as {adapter} records it\): there is no dir"
    ):
        load_trained(adapter)
    with pytest.raises(ModelError, match=r"^--model: there is no directory /nowhere"):
        load_trained(adapter, path="/nowhere")
    load_trained(adapter, path=str(moved))


def test_a_tokenizer_that_is_gone_is_named_with_the_file(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    public_adapter(base, adapter)
    settings = json.loads((adapter / "ssmlora.json").read_text())
    settings["base"]["tokenizer"] = "/nowhere"
    (adapter / "ssmlora.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"ssmlora\.json: base\.tokenizer: there is no directory /nowhere"):
        load_trained(adapter)


def run_config(model: dict[str, Any], **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "r"},
            "model": {"init": "random", "tokenizer": "bytes", **model},
            "data": {"train": {"format": "text", "path": "x"}, **data},
            "training": {"max_steps": 1},
        }
    )


def test_a_tokenizer_of_more_tokens_than_the_model_has(base: Path, tmp_path: Path) -> None:
    """On every road: runs and dry runs build it from the section, adapters are loaded with it."""
    section = run_config({"config": tiny_config()}).model
    with pytest.raises(ModelError, match=r"model\.tokenizer: .*258.*67"):
        build_tokenizer(section, print)
    adapter = tmp_path / "adapter"
    public_adapter(base, adapter)
    settings = json.loads((adapter / "ssmlora.json").read_text())
    settings["base"]["tokenizer"] = "bytes"
    (adapter / "ssmlora.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"base\.tokenizer: .*258.*67"):
        load_trained(adapter)


def test_rows_longer_than_the_positions_are_refused() -> None:
    config = tiny_config(vocab_size=259)
    check_model(run_config({"config": config}, max_length=64))
    with pytest.raises(ConfigError, match=r"data\.max_length: 65 given; allowed: at most 64"):
        check_model(run_config({"config": config}, max_length=65))
    for rope, limit, remedy in (
        ({"rope_type": "dynamic", "factor": 2.0}, 64, '"yarn", "factor": 3}'),
        ({"rope_type": "linear", "factor": 2.0}, 128, '"yarn", "factor": 3}'),
    ):
        scaled = {"config": config | {"rope_scaling": rope}}
        check_model(run_config(scaled, max_length=limit))
        with pytest.raises(ConfigError, match=f"129 given; allowed: at most {limit}.*{remedy}"):
            check_model(run_config(scaled, max_length=129))
    given = {"config": config, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    check_model(run_config(given, max_length=128))
    with pytest.raises(
        ConfigError, match=r"129 given; .* 128, .*or set model\.rope_parameters\.factor to 3$"
    ):
        check_model(run_config(given, max_length=129))
    learnt = {"config": bare_config("opt") | {"vocab_size": 259}}
    with pytest.raises(ConfigError, match=r"at most 64, for which the model's positions are made; lower it$"):
        check_model(run_config(learnt, max_length=65))
    check_model(run_config({"config": config}, max_length=65), for_training=False)


def test_a_module_that_every_stage_holds_is_not_trained_whole() -> None:
    """transformers' plan for stages of stablelm models says nothing of the final norm."""
    config = run_config({"config": bare_config("stablelm")}, max_length=64)
    adapter = config.adapter.model_copy(update={"modules_to_save": ("embed_tokens", "norm")})
    config = config.model_copy(update={"adapter": adapter})
    check_model(config)
    parallel = config.parallel.model_copy(update={"pipeline_stages": 2})
    with pytest.raises(ConfigError, match=r"adapter\.modules_to_save: model\.norm given with 2 .* to 1"):
        check_model(config.model_copy(update={"parallel": parallel}))


def shared_among(ranks: int, model_type: str, *, packing: bool = False, **sizes: Any) -> None:
    model = {"config": bare_config(model_type) | sizes, "compute_dtype": "float32"}
    config = run_config(model, max_length=60, packing=packing)
    parallel = config.parallel.model_copy(update={"sequence_parallel": ranks})
    check_model(config.model_copy(update={"parallel": parallel}))


@pytest.mark.filterwarnings("ignore")
def test_rows_that_cannot_be_packed_or_shared_are_refused() -> None:
    shared_among(2, "qwen3_moe", packing=True)
    with pytest.raises(ConfigError, match=r"data\.packing: true given; .*; set it to false"):
        shared_among(1, "lfm2", packing=True)
    with pytest.raises(ConfigError, match=r"parallel\.sequence_parallel: 2 given; .*; set it to 1"):
        shared_among(2, "lfm2")
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
    shared_among(6, "llama", **heads)
    with pytest.raises(ConfigError, match=r"sequence_parallel: 3 given; allowed: 1 or 2, 6, among which"):
        shared_among(3, "llama", **heads)


def test_shared_rows_take_no_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module.importlib.util, "find_spec", lambda name: object())

    def sharing(ranks: int, attention: str, model_type: str = "llama") -> RunConfig:
        model = {"config": bare_config(model_type), "compute_dtype": "bfloat16", "attention": attention}
        config = run_config(model, max_length=60)
        parallel = config.parallel.model_copy(update={"sequence_parallel": ranks})
        return config.model_copy(update={"parallel": parallel})

    check_model(sharing(2, "auto"), "cuda")
    for config, expected in (
        (sharing(1, "auto"), "auto"),
        (sharing(2, "auto"), "sdpa"),
        (sharing(2, "auto", "gemma2"), "eager"),
        (sharing(2, "flash_attention_2"), "flash_attention_2"),
    ):
        assert attention_of(config, shapes_of(config.model)) == expected
    with pytest.raises(ConfigError, match=r'2 given with flash_attention_2; .* to "auto", which is sdpa'):
        check_model(sharing(2, "flash_attention_2"), "cuda")


def test_tiles_without_an_mlp_to_cut_are_refused() -> None:
    def tiled(model: dict[str, Any]) -> RunConfig:
        config = run_config({"config": model | {"vocab_size": 259}}, max_length=64)
        return config.model_copy(
            update={"training": config.training.model_copy(update={"mlp_tile_size": 4096})}
        )

    check_model(tiled(tiny_config()))
    check_model(tiled(bare_config("glm4_moe")))
    with pytest.raises(ConfigError, match=r"training\.mlp_tile_size: 4096 given; .*mixtral.*set it to null"):
        check_model(tiled(bare_config("mixtral")))


def test_an_adapter_without_a_base_model(tmp_path: Path) -> None:
    save_adapter(add_adapters(tiny_model(), LORA), tmp_path)
    with pytest.raises(AdapterError, match="does not record its base model; name it with --model"):
        load_trained(tmp_path)
