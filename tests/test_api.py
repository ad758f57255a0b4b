"""The public interface: adapt, save, load, generate; whatever else a model of transformers is asked for."""

from __future__ import annotations

import copy
import json
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter, save_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.errors import AdapterError, ModelError
from tests.tiny import FAMILY_NAMES, QV_AND_MLP, adapted_model, randomize_adapters, tiny_model, token_ids

FINGERPRINT = "0123456789abcdef" * 4
CONFIGS = {
    "ssmlora": QV_AND_MLP,
    "everywhere": AdapterConfig(
        rank=3,
        alpha=5.0,
        every_layer=("gate_proj",),
        every_layer_method="ssmlora",
        carry="raw",
        normalization="rms",
        state_gradient="detached",
        state_dtype="float32",
    ),
    "lora": AdapterConfig(method="lora", rank=4, every_layer=("o_proj",)),
    "some layers": AdapterConfig(rank=3, layers="-3:", every_layer=("o_proj",)),
    "places": AdapterConfig(rank=3, places=("0.up_proj", "3.q_proj", "4.up_proj")),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, 9), use_cache=False).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_saved_is_loaded_bitwise(config: AdapterConfig, quantization: str, tmp_path: Path) -> None:
    model = adapted_model(config=config, quantization=quantization)
    save_adapter(model, tmp_path / "made" / "adapter")
    loaded = load_adapter(tiny_model(quantization=quantization), tmp_path / "made" / "adapter")
    expected, parameters = adapter_parameters(model), adapter_parameters(loaded)
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(parameters)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_family_is_saved_and_loaded(model_type: str, tmp_path: Path) -> None:
    model = adapted_model(model_type)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(tiny_model(model_type), tmp_path)), logits(model))


def test_values_of_an_adapted_model_are_replaced(tmp_path: Path) -> None:
    model = adapted_model()
    save_adapter(model, tmp_path)
    expected = logits(model)
    randomize_adapters(model, seed=1)
    assert not torch.equal(logits(model), expected)
    assert load_adapter(model, tmp_path) is model
    assert torch.equal(logits(model), expected)


def test_a_model_without_adapter_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="carries no adapter; call add_adapters first"):
        save_adapter(tiny_model(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("saved", "loaded", "refused"),
    [
        (FINGERPRINT, FINGERPRINT, False),
        (FINGERPRINT, FINGERPRINT[::-1], True),
        (FINGERPRINT, None, False),
        (None, FINGERPRINT, False),
    ],
)
def test_the_fingerprint_of_another_base_is_refused(
    saved: str | None, loaded: str | None, refused: bool, tmp_path: Path
) -> None:
    save_adapter(adapted_model(), tmp_path, base_fingerprint=saved)
    model = tiny_model()
    if not refused:
        load_adapter(model, tmp_path, base_fingerprint=loaded)
        return
    with pytest.raises(
        AdapterError, match=r"trained on another base model .*0123456789ab.*load that base"
    ) as caught:
        load_adapter(model, tmp_path, base_fingerprint=loaded)
    assert str(tmp_path) in str(caught.value)
    assert adapter_parameters(model) == {}


def set_rank(directory: Path, rank: int) -> None:
    settings = json.loads((directory / "ssmlora.json").read_text())
    settings["adapter"]["rank"] = rank
    (directory / "ssmlora.json").write_text(json.dumps(settings))


def drop_a_tensor(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.2.self_attn.q_proj.state_input")
    save_file(tensors, directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "base", "message"),
    [
        (
            None,
            {"hidden_size": 32},
            r"lora_B.weight is \[16, 4\], the model needs \[32, 4\]; .*another base model",
        ),
        (None, {"num_layers": 7}, r"lacks model.layers.6\..*; it was saved for another model or placement"),
        (None, {"num_layers": 5}, r"holds model.layers.5\..*, which the model has no adapter for"),
        (
            lambda d: set_rank(d, 8),
            {},
            r"is \[4, 24\], the model needs \[8, 24\]; .*another base model or rank",
        ),
        (drop_a_tensor, {}, "lacks model.layers.2.self_attn.q_proj.state_input"),
    ],
    ids=["width", "deeper", "shallower", "rank", "tensor"],
)
def test_an_adapter_of_another_shape_is_refused(
    spoil: Callable[[Path], None] | None, base: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_adapter(adapted_model(), tmp_path)
    if spoil:
        spoil(tmp_path)
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(tiny_model(**base), tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_an_adapter_of_another_configuration_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted_model(), tmp_path)
    model = adapted_model(config=QV_AND_MLP.model_copy(update={"carry": "raw"}))
    before = logits(model)
    with pytest.raises(AdapterError, match=r"its adapter configuration is .*the model has .*carry='raw'"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_generation_works_after_loading(model_type: str, tmp_path: Path) -> None:
    model = adapted_model(model_type)
    save_adapter(model, tmp_path)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    prompt = token_ids(1, 6)
    loaded = load_adapter(tiny_model(model_type), tmp_path)
    generated = loaded.generate(prompt, **settings)
    assert generated.shape == (1, 11)
    assert torch.equal(generated, model.generate(prompt, **settings))
    assert not torch.equal(logits(loaded), logits(tiny_model(model_type)))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
def test_other_ways_to_generate_work(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    generated = adapted_model().generate(token_ids(2, 6), max_new_tokens=4, **settings)
    assert generated.shape == (2, 10)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_copy_is_equal_and_independent(quantization: str) -> None:
    model = adapted_model(quantization=quantization)
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    randomize_adapters(model, seed=1)
    assert torch.equal(logits(copied), expected)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_hidden_states_of_every_layer_can_be_had(model_type: str) -> None:
    model = adapted_model(model_type)
    base = tiny_model(model_type)
    tokens = token_ids(2, 9)
    output = model(tokens, use_cache=False, output_hidden_states=True)
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 9, 16)] * 7
    assert torch.equal(output.logits, model(tokens, use_cache=False).logits)
    unadapted = base(tokens, use_cache=False, output_hidden_states=True).hidden_states
    changed = [not torch.equal(a, b) for a, b in zip(output.hidden_states, unadapted, strict=True)]
    assert changed == [False] + [True] * 6


def test_the_seed_decides_the_start() -> None:
    first, again, other = (adapter_parameters(add_adapters(tiny_model(), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_save_pretrained_writes_an_adapter_directory(
    config: AdapterConfig, quantization: str, tmp_path: Path
) -> None:
    model = adapted_model(config=config, quantization=quantization)
    save_adapter(model, tmp_path / "wanted")
    # As a copy does, and one that was sent to another process.
    for index, saved in enumerate((model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        directory = tmp_path / str(index)
        saved.save_pretrained(directory)
        assert contents(directory) == contents(tmp_path / "wanted")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_model_without_adapter_is_saved_as_before(tmp_path: Path) -> None:
    adapted_model()
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert "model.safetensors" in contents(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= model.state_dict().keys()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_an_adapted_model_keeps_the_name_of_its_class() -> None:
    model = adapted_model()
    assert isinstance(model, type(tiny_model()))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"
    assert str(model) == str(model).replace("Adapted", "").replace("Stateful", "")


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path) -> None:
    adapted_model().save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_gathered_values_are_saved_in_place_of_the_models_own(tmp_path: Path) -> None:
    """What a trainer passes whose model is sharded."""
    model, other = adapted_model(), adapted_model()
    randomize_adapters(other, seed=1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(logits(load_adapter(tiny_model(), tmp_path)), logits(other))


@pytest.mark.parametrize("gathered", [False, True])
def test_values_that_are_not_here_are_not_saved(gathered: bool, tmp_path: Path) -> None:
    model, name = adapted_model(), "model.layers.0.self_attn.q_proj.lora_A.weight"
    state_dict = model.state_dict()
    if gathered:
        del state_dict[name]
    else:
        # As ZeRO 3 leaves it.
        model.get_parameter(name).data = torch.empty(0)
    with pytest.raises(AdapterError, match=rf"{name} has no values here.*`state_dict`"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state_dict if gathered else None)
    assert not (tmp_path / "adapter").exists()


def test_what_an_adapter_directory_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"an adapter directory.* variant"):
        adapted_model().save_pretrained(tmp_path / "adapter", variant="fp16")
    assert not (tmp_path / "adapter").exists()
    adapted_model().save_pretrained(tmp_path / "adapter", max_shard_size="5GB", token=None)


@pytest.mark.parametrize("said", [{"safe_serialization": True}, {"save_peft_format": True}], ids=str)
def test_options_that_say_what_an_adapter_directory_is(said: dict[str, Any], tmp_path: Path) -> None:
    model = adapted_model()
    model.save_pretrained(tmp_path / "adapter", **said)
    save_adapter(model, tmp_path / "wanted")
    assert contents(tmp_path / "adapter") == contents(tmp_path / "wanted")
    with pytest.raises(AdapterError, match=f"an adapter directory.* {next(iter(said))}"):
        model.save_pretrained(tmp_path / "other", **dict.fromkeys(said, False))


def test_a_home_directory_in_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = adapted_model()
    save_adapter(model, "~/one")
    model.save_pretrained("~/two")
    for name in ("one", "two"):
        assert (tmp_path / name).is_dir()
        assert torch.equal(logits(load_adapter(tiny_model(), f"~/{name}")), logits(model))
    assert not (tmp_path / "~").exists()


def cast(model: Any) -> None:
    model.to(torch.bfloat16)


def cast_a_layer(model: Any) -> None:
    model.model.layers[1].to(torch.bfloat16)


@pytest.mark.parametrize(("quantization", "change"), [("nf4", cast), ("none", cast_a_layer)])
def test_a_precision_that_differs_within_the_model_is_not_recorded(
    quantization: str, change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = adapted_model(quantization=quantization)
    change(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "ssmlora.json").read_text())["base"] == {
        "path": None,
        "rope_parameters": None,
    }


def test_a_cast_model_is_recorded_as_it_is(tmp_path: Path) -> None:
    model = adapted_model()
    cast(model)
    save_adapter(model, tmp_path)
    base = json.loads((tmp_path / "ssmlora.json").read_text())["base"]
    assert base == {
        "path": None,
        "rope_parameters": None,
        "quantization": "none",
        "compute_dtype": "bfloat16",
    }


def wrapped_by_peft() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))


def without_its_head() -> Any:
    return tiny_model().model


@pytest.mark.parametrize("build", [wrapped_by_peft, without_its_head, lambda: torch.nn.Linear(2, 2)])
def test_what_is_no_causal_language_model_is_refused(build: Callable[[], Any], tmp_path: Path) -> None:
    save_adapter(adapted_model(), tmp_path)
    for adapt in (add_adapters, lambda model: load_adapter(model, tmp_path)):
        with pytest.raises(ModelError, match=r"no causal language model of transformers.*`load_model`"):
            adapt(build())


@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_a_model_that_carries_adapters_of_peft_is_refused(projection: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"carries adapters already"):
        add_adapters(model, AdapterConfig(alternate=(projection,)))


def test_push_to_hub_uploads_the_adapter_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = adapted_model()
    save_adapter(model, tmp_path / "mine")
    uploads: list[tuple[str, dict[str, bytes], Any]] = []

    def upload(self: Any, directory: str, repo_id: str, **options: Any) -> None:
        found = contents(Path(directory))
        found.pop("README.md")
        uploads.append((repo_id, found, options["commit_message"]))

    hub = "transformers.utils.hub"
    repository = types.SimpleNamespace(repo_id="me/mine")
    api = types.SimpleNamespace(create_repo=lambda *_, **__: repository)
    card = types.SimpleNamespace(save=lambda path: Path(path).write_text(""))
    monkeypatch.setattr(f"{hub}.hf_api", lambda: api)
    monkeypatch.setattr(f"{hub}.create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(f"{hub}.PushToHubMixin._upload_modified_files", upload)
    model.push_to_hub("mine", commit_message="first")
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="second")
    expected = contents(tmp_path / "mine")
    assert uploads == [("me/mine", expected, "first"), ("me/mine", expected, "second")]
