"""Streamed loading against transformers' own loading of the same files, and what it refuses."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.projections import linear_layers
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import decoder_layers, load_model, structure_of
from ssmlora_dist.models import loading as loading_module
from ssmlora_dist.models.loading import build_skeleton, fill
from ssmlora_dist.models.stage import StageLayers
from ssmlora_dist.models.weights import RandomWeights, SafetensorsWeights
from ssmlora_dist.quantization import dequantized_weight, is_quantized, quantize_linear
from tests.tiny import FAMILY_NAMES

DTYPES = [torch.float32, torch.bfloat16]
# With rows of whole blocks, as bitsandbytes on CPUs mixes up the scales of others.
WHOLE_ROWS = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
MODES = ["none", "nf4", "fp4", "int8"]


@pytest.fixture(scope="module")
def whole_rows(save_checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """A sharded float32 checkpoint of each family."""
    return {model_type: save_checkpoint(model_type, **WHOLE_ROWS) for model_type in FAMILY_NAMES}


def hugging_face_model(directory: Path, dtype: torch.dtype, quantization: str, attention: str) -> Any:
    """Loaded by transformers, in training mode: in evaluation bitsandbytes computes other numbers on CPU."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized: dict[str, Any] = {}
    if quantization == "int8":
        quantized["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    elif quantization != "none":
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation=attention, device_map="cpu", **quantized
        ).train()


def logits(model: Any, token_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids, use_cache=False).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", MODES)
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_logits_are_those_of_hugging_face_bitwise(
    model_type: str,
    quantization: Any,
    dtype: torch.dtype,
    whole_rows: dict[str, Path],
    token_ids: Tensor,
) -> None:
    directory = whole_rows[model_type]
    model = load_model(str(directory), quantization=quantization, compute_dtype=dtype)
    expected = hugging_face_model(directory, dtype, quantization, model.config._attn_implementation)
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))
    buffers = dict(expected.named_buffers())
    for name, buffer in model.named_buffers():
        if name in buffers:
            assert torch.equal(buffer, buffers[name]), name
            assert buffer.dtype == buffers[name].dtype, name


def test_the_checkpoints_are_sharded(checkpoints: dict[str, Path]) -> None:
    for directory in checkpoints.values():
        assert len(list(directory.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("native", ["bfloat16", "float32"])
def test_without_a_dtype_it_is_that_of_the_machine(
    checkpoints: dict[str, Path], native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_module, "machine_dtype", lambda device_type: native)
    model = load_model(str(checkpoints["llama"]))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, native)}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_single_file_of_another_dtype_loads(
    stored: torch.dtype, save_checkpoint: Callable[..., Path], token_ids: Tensor
) -> None:
    directory = save_checkpoint("llama", stored, "1GB", **WHOLE_ROWS)
    assert (directory / "model.safetensors").is_file()
    model = load_model(str(directory), compute_dtype=torch.float32)
    expected = hugging_face_model(directory, torch.float32, "nf4", "sdpa")
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings(
    rope: dict[str, Any], save_checkpoint: Callable[..., Path], token_ids: Tensor
) -> None:
    directory = save_checkpoint("llama", rope_parameters=rope)
    model = load_model(str(directory), quantization="none", compute_dtype=torch.float32)
    expected = hugging_face_model(directory, torch.float32, "none", "sdpa")
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("quantization", MODES)
def test_what_is_quantised_frozen_and_placed(
    model_type: str, quantization: Any, checkpoints: dict[str, Path]
) -> None:
    model = load_model(str(checkpoints[model_type]), quantization=quantization, compute_dtype=torch.bfloat16)
    projections = [
        linear for layer in decoder_layers(model).values() for linear in linear_layers(layer).values()
    ]
    assert len(projections) == 14
    assert all(is_quantized(projection) == (quantization != "none") for projection in projections)
    assert sum(is_quantized(module) for module in model.modules()) == 14 * (quantization != "none")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16
    assert not model.training


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_tied_weights_are_one_parameter(
    quantization: Any, save_checkpoint: Callable[..., Path], token_ids: Tensor
) -> None:
    directory = save_checkpoint("llama", tie_word_embeddings=True, **WHOLE_ROWS)
    assert "lm_head.weight" not in SafetensorsWeights(directory).names
    model = load_model(str(directory), quantization=quantization, compute_dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = hugging_face_model(directory, torch.float32, quantization, "sdpa")
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))


def test_a_tied_weight_may_be_stored_as_the_head(
    save_checkpoint: Callable[..., Path], rewrite: Callable[..., None], token_ids: Tensor
) -> None:
    directory = save_checkpoint("llama", max_shard_size="1GB", tie_word_embeddings=True)
    expected = logits(load_model(str(directory)), token_ids)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(logits(load_model(str(directory)), token_ids), expected)


def test_tied_weights_that_differ_are_refused(
    save_checkpoint: Callable[..., Path], rewrite: Callable[..., None]
) -> None:
    directory = save_checkpoint("llama", max_shard_size="1GB", tie_word_embeddings=True)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        load_model(str(directory))


def test_generation_settings_of_the_directory_are_kept(single: Path) -> None:
    file = single / "generation_config.json"
    settings = {"do_sample": True, "temperature": 0.3, "eos_token_id": [5, 6]}
    file.write_text(json.dumps(settings))
    model = load_model(str(single))
    assert model.generation_config.temperature == 0.3
    assert model.generation_config.eos_token_id == [5, 6]
    file.write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        load_model(str(single))


def test_generate_works(checkpoints: dict[str, Path], token_ids: Tensor) -> None:
    model = load_model(str(checkpoints["qwen3"]))
    generated = model.generate(token_ids, max_new_tokens=3, do_sample=False, pad_token_id=3)
    assert torch.equal(generated[:, : token_ids.shape[1]], token_ids)


def test_an_evaluation_between_training_passes_changes_no_gradient(
    checkpoints: dict[str, Path], token_ids: Tensor
) -> None:
    def gradient(model: Any) -> Tensor:
        embedded = model.model.embed_tokens(token_ids).detach().requires_grad_()
        model.train()(inputs_embeds=embedded, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    model, untouched = (load_model(str(checkpoints["llama"])) for _ in range(2))
    gradient(model)
    logits(model.eval(), token_ids)
    result = gradient(model)
    assert result.abs().max() > 0
    assert torch.equal(result, gradient(untouched))


def random_model(config: dict[str, Any], **changes: Any) -> Any:
    return load_model(init="random", config=config, **({"seed": 3} | changes))


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_random_weights_depend_on_seed_and_name_alone(
    model_type: str, tiny_config: Callable[..., Any]
) -> None:
    config = tiny_config(model_type)
    torch.manual_seed(0)
    first = random_model(config, quantization="none", compute_dtype=torch.float32).state_dict()
    torch.manual_seed(1)
    second = random_model(config, quantization="none", compute_dtype=torch.float32).state_dict()
    other = random_model(config, quantization="none", compute_dtype=torch.float32, seed=4).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name]), name
    deeper = random_model(
        config | {"num_hidden_layers": 3}, quantization="none", compute_dtype=torch.float32
    ).state_dict()
    assert all(torch.equal(tensor, deeper[name]) for name, tensor in first.items())


def test_random_weights_are_drawn_as_transformers_draws_them(tiny_config: Callable[..., Any]) -> None:
    model = random_model(
        tiny_config("qwen2", initializer_range=0.1), quantization="none", compute_dtype=torch.float32
    )
    layer = decoder_layers(model)[0]
    # 5%: three standard errors of the standard deviation of 2,048 draws.
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.self_attn.q_proj.bias.abs().max() == 0
    assert torch.equal(layer.input_layernorm.weight, torch.ones(32))
    assert model.model.embed_tokens.weight[3].abs().max() == 0


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_random_weights_are_quantised_as_others_are(
    quantization: Any, tiny_config: Callable[..., Any]
) -> None:
    dense = random_model(tiny_config("llama"), quantization="none")
    quantized = random_model(tiny_config("llama"), quantization=quantization)
    for ours, original in zip(
        decoder_layers(quantized).values(), decoder_layers(dense).values(), strict=True
    ):
        expected = dequantized_weight(quantize_linear(original.mlp.up_proj, mode=quantization))
        assert torch.equal(dequantized_weight(ours.mlp.up_proj), expected)
    assert torch.equal(quantized.lm_head.weight, dense.lm_head.weight)


def test_random_weights_take_their_shapes_from_a_path(single: Path) -> None:
    model = load_model(str(single), init="random", seed=1)
    assert model.config.hidden_size == 32
    assert not torch.equal(model.lm_head.weight, load_model(str(single)).lm_head.weight)


def test_any_part_can_be_filled_alone(single: Path) -> None:
    whole = load_model(str(single), quantization="none", compute_dtype=torch.float32)
    device = torch.device("cpu")
    skeleton = build_skeleton(whole.config, torch.float32, "sdpa", device)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    names = StageLayers(0, 2, 2).part_names(structure_of(skeleton))
    assert names == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    part = skeleton.get_submodule("model.layers.1")
    fill(part, "model.layers.1", SafetensorsWeights(single), device=device)
    for name, parameter in skeleton.named_parameters():
        assert parameter.is_meta == (not name.startswith("model.layers.1.")), name
        if not parameter.is_meta:
            assert torch.equal(parameter, whole.get_parameter(name)), name


def test_no_more_than_one_dense_projection_is_alive(
    tiny_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[nn.Linear] = weakref.WeakSet()
    most = 0

    def quantize(linear: nn.Linear, **settings: Any) -> nn.Module:
        nonlocal most
        alive.add(linear)
        most = max(most, len([layer for layer in alive if not layer.weight.is_meta]))
        return quantize_linear(linear, **settings)

    monkeypatch.setattr(loading_module, "quantize_linear", quantize)
    gc.disable()
    try:
        random_model(tiny_config("llama"))
    finally:
        gc.enable()
    assert most == 1


def test_random_weights_do_not_depend_on_what_was_read_before() -> None:
    weights = RandomWeights(5, std=0.02, initial_value=lambda name: torch.ones(4))
    where: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    shape = torch.Size([3, 4])
    alone = weights.read("b.weight", shape=shape, **where)
    assert not torch.equal(weights.read("a.weight", shape=shape, **where), alone)
    assert torch.equal(weights.read("b.weight", shape=shape, **where), alone)
