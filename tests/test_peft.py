"""Plain LoRA adapters go to PEFT and come from it, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssmlora_dist import AdapterConfig, load_adapter, save_adapter
from ssmlora_dist.errors import AdapterError
from tests.tiny import FAMILY_NAMES, QV_AND_MLP, adapted_model, tiny_model, token_ids

# PEFT warns of much that is meant here, and calls functions of transformers that are to go.
pytestmark = pytest.mark.filterwarnings("ignore")

# Float32: PEFT adds the same terms in another order.
LOGITS_TOLERANCE = 1e-5
NUM_LAYERS = 6
PLACEMENTS = {
    "dense": AdapterConfig(
        method="lora", rank=4, alpha=6.0, alternate=(), every_layer=("q_proj", "down_proj")
    ),
    "alternate": AdapterConfig(method="lora", rank=4),
    "both": AdapterConfig(
        method="lora", rank=4, alternate=("v_proj", "q_proj", "o_proj"), every_layer=("up_proj",)
    ),
    "dense in some layers": AdapterConfig(
        method="lora", rank=4, alternate=(), every_layer=("q_proj", "down_proj"), layers="1:-1"
    ),
    "rslora": AdapterConfig(method="lora", rank=4, alpha=3.0, rslora=True),
    "places": AdapterConfig(method="lora", rank=4, places=("0.q_proj", "0.down_proj", "4.v_proj")),
    "alternate in some layers": AdapterConfig(method="lora", rank=4, layers=(0, 3, -1)),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(2, 9), use_cache=False).logits


def assert_same_logits(model: Any, expected: Any) -> None:
    got, wanted = logits(model), logits(expected)
    error = (got - wanted).abs().max().item()
    assert error <= LOGITS_TOLERANCE, f"logits differ by {error:.1e}"
    # The adapter does something that the base model does not.
    assert (wanted - logits(tiny_model(expected.config.model_type))).abs().max() > 0.1


def draw_saved(model: Any) -> None:
    """Moves PEFT's copies of modules away from their start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.3 * torch.randn_like(parameter)


def peft_model(model_type: str = "llama", base: Any = None, **settings: Any) -> Any:
    """A model that PEFT has adapted, all matrices drawn at random."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(7)
    print("seed 7")
    arguments: dict[str, Any] = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(base or tiny_model(model_type), peft.LoraConfig(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    return model


def by_layer(placed: dict[str, range]) -> list[str]:
    return [f"model.layers.{i}.self_attn.{name}" for name, layers in placed.items() for i in layers]


@pytest.mark.parametrize("config", PLACEMENTS.values(), ids=PLACEMENTS)
def test_our_lora_loads_in_peft(config: AdapterConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted_model(config=config)
    save_adapter(model, tmp_path)
    assert_same_logits(peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval(), model)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_our_lora_loads_in_peft_in_every_family(model_type: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted_model(model_type, PLACEMENTS["both"])
    save_adapter(model, tmp_path)
    assert_same_logits(peft.PeftModel.from_pretrained(tiny_model(model_type), tmp_path).eval(), model)


def test_peft_refuses_an_adapter_with_state(tmp_path: Path) -> None:
    """Rather than to load its LoRA half and compute something else."""
    peft = pytest.importorskip("peft")
    save_adapter(adapted_model(config=QV_AND_MLP), tmp_path)
    with pytest.raises((ValueError, KeyError, TypeError)):
        peft.PeftModel.from_pretrained(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "alternate"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ()),
        ({"target_modules": "all-linear"}, ()),
        ({"target_modules": ["q_proj", "down_proj"], "use_rslora": True}, ()),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 4]}, ()),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2, "layers_pattern": "layers"}, ()),
        (
            {"target_modules": by_layer({"q_proj": range(0, 6, 2), "v_proj": range(1, 6, 2)})},
            ("q_proj", "v_proj"),
        ),
        ({"target_modules": ["1.self_attn.q_proj", "1.mlp.up_proj", "4.self_attn.q_proj"]}, ()),
        ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.1}, ()),
    ],
    ids=[
        "every_layer",
        "all_linear",
        "rslora",
        "some_layers",
        "one_layer",
        "alternate",
        "places",
        "gaussian",
    ],
)
def test_lora_of_peft_loads_here(
    settings: dict[str, Any], alternate: tuple[str, ...], tmp_path: Path
) -> None:
    model = peft_model(**settings)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(tiny_model(), tmp_path)
    assert loaded.ssmlora_config.alternate == alternate
    assert_same_logits(loaded.eval(), model)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_lora_of_peft_loads_here_in_every_family(model_type: str, tmp_path: Path) -> None:
    model = peft_model(model_type, target_modules=["k_proj", "up_proj"])
    model.save_pretrained(tmp_path)
    assert_same_logits(load_adapter(tiny_model(model_type), tmp_path), model)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_that_are_saved_whole_go_to_peft_and_come_from_it(tied: bool, tmp_path: Path) -> None:
    """A copy of a tied embedding is trained, there as here, and the head stays as it is."""
    peft = pytest.importorskip("peft")
    names = ["embed_tokens", "norm", "1.input_layernorm", *([] if tied else ["lm_head"])]
    settings = {"target_modules": ["q_proj"], "modules_to_save": names}
    model = peft_model(base=tiny_model(tie_word_embeddings=tied), **settings)
    draw_saved(model)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tiny_model(tie_word_embeddings=tied), tmp_path / "theirs")
    assert_same_logits(loaded, model)
    save_adapter(loaded, tmp_path / "ours")
    stored, ours = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("theirs", "ours"))
    assert stored.keys() == ours.keys()
    there = peft.PeftModel.from_pretrained(tiny_model(tie_word_embeddings=tied), tmp_path / "ours")
    assert_same_logits(there.eval(), model)


@pytest.mark.parametrize("name", ["alternate", "rslora", "places", "alternate in some layers"])
def test_lora_goes_to_peft_and_back(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted_model(config=PLACEMENTS[name])
    save_adapter(model, tmp_path / "ours")
    there = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "ours")
    there.save_pretrained(tmp_path / "theirs")
    back = load_adapter(tiny_model(), tmp_path / "theirs")
    assert back.ssmlora_config == model.ssmlora_config
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is {'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is {'q_proj': 2}"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model too"),
        ({"target_modules": ["q_proj", "lm_head"]}, "an adapter of lm_head, which is no linear layer of a"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "an adapter of model.embed_tokens, which is no linear layer of a",
        ),
    ],
)
def test_what_only_peft_can_do_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = peft_model(**({"target_modules": ["q_proj", "v_proj"]} | settings))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(tiny_model(), tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
