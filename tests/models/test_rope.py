"""A RoPE that reaches beyond a model's positions: transformers' own numbers, I1, I5, and where it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter, save_adapter
from ssmlora_dist.config.build import load_trained, with_recorded_rope
from ssmlora_dist.errors import AdapterError, ModelError
from ssmlora_dist.models import load_config, load_model, max_positions
from ssmlora_dist.models.merging import merge_adapter
from tests.decoders import bare_config
from tests.models.test_tokenizer import save_word_tokenizer
from tests.tiny import QV_AND_MLP, SEED, randomize_adapters, tiny_config, token_ids
from tests.training.test_task_evaluation import config as run_config

pytestmark = pytest.mark.filterwarnings("ignore")

YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": YARN,
    "yarn of DeepSeek": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False, "rope_theta": 500.0},
    "llama3": {"rope_type": "llama3", "factor": 3.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
# Float32 logits of order 3, over keys in another order.
LOGITS_TOLERANCE = 1e-5
LORA = AdapterConfig(method="lora", rank=4)
# Tokens of a row, more than the 64 positions of the model.
LENGTH = 100


def model_with(rope: dict[str, Any] | None, bare: dict[str, Any] | None = None) -> Any:
    bare = bare or tiny_config(num_layers=2)
    settings: dict[str, Any] = {"quantization": "none", "compute_dtype": torch.float32, "seed": SEED}
    return load_model(init="random", config=bare, rope_parameters=rope, **settings)


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(token_ids(1, LENGTH) if tokens is None else tokens, use_cache=False).logits
    return found


def transformers_own(model: Any, bare: dict[str, Any], rope: dict[str, Any]) -> Any:
    """A model that transformers builds by itself with that RoPE, with the weights of `model`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in bare.items() if key != "model_type"}
    config = AutoConfig.for_model(bare["model_type"], **values, rope_parameters=rope)
    found = AutoModelForCausalLM.from_config(config, attn_implementation=model.config._attn_implementation)
    found.load_state_dict(model.state_dict())
    return found.eval()


@pytest.mark.parametrize("rope", SETTINGS.values(), ids=SETTINGS)
def test_it_is_transformers_own(rope: dict[str, Any]) -> None:
    bare = tiny_config(num_layers=2)
    model = model_with(rope)
    assert torch.equal(logits(model), logits(transformers_own(model, bare, {"rope_theta": 10000.0} | rope)))
    assert (logits(model) - logits(model_with(None))).abs().max() > 0.1
    assert max_positions(model.config) == 64 * rope["factor"]


# Partial rotation, kinds of layers with a RoPE of their own, and a model that is scaled already.
OTHERS: dict[str, dict[str, Any]] = {
    "phi": YARN | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "gemma3_text": {
        "full_attention": YARN | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt_oss": YARN | {"rope_theta": 150000.0, "original_max_position_embeddings": 4096},
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families(model_type: str) -> None:
    bare = bare_config(model_type)
    model = model_with(YARN, bare)
    assert torch.equal(logits(model), logits(transformers_own(model, bare, OTHERS[model_type])))
    assert not torch.equal(logits(model), logits(model_with(None, bare)))
    assert max_positions(model.config) == 4 * (4096 if model_type == "gpt_oss" else 64)


@pytest.mark.parametrize(
    ("model_type", "rope", "message"),
    [
        ("opt", YARN, "given, and opt models have no RoPE"),
        ("phi3", YARN, "not for phi3 models in transformers: .*'longrope'"),
        (
            "llama",
            {"rope_type": "dynamic", "factor": 2.0},
            r'rope_type: "dynamic" given; .*before and beside',
        ),
        ("llama", YARN | {"factor": 0.5}, r"factor: .*greater than or equal to 1"),
        ("llama", YARN | {"low_freq_factor": 1.0}, '`low_freq_factor` 1.0 given, which "yarn" does not read'),
    ],
)
def test_what_is_refused(model_type: str, rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.rope_parameters.*{message}"):
        load_config(config=bare_config(model_type), rope_parameters=rope)


def test_i1_and_i5_with_yarn() -> None:
    tokens = token_ids(1, LENGTH)
    model = model_with(YARN)
    before = logits(model)
    add_adapters(model, QV_AND_MLP)
    assert torch.equal(logits(model), before)
    randomize_adapters(model)
    whole = logits(model)
    with torch.no_grad():
        cache = model(tokens[:, :40], use_cache=True).past_key_values
        rest = [
            model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(40, 80)
        ]
    error = (torch.cat(rest, 1) - whole[:, 40:80]).abs().max().item()
    assert error <= LOGITS_TOLERANCE, f"cached logits differ by {error:.1e}"
    # A longer input that was seen before changes nothing.
    logits(model, token_ids(1, 250))
    assert torch.equal(logits(model), whole)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model_with(None).save_pretrained(tmp_path / "base")
    save_word_tokenizer(tmp_path / "base", eos_token="</s>")
    return tmp_path / "base"


def trained(base: Path, out: Path, rope: dict[str, Any] | None = YARN) -> Any:
    """The model of the adapter that is saved in `out`."""
    dense: dict[str, Any] = {"quantization": "none", "compute_dtype": torch.float32}
    model = add_adapters(load_model(str(base), rope_parameters=rope, **dense), LORA)
    randomize_adapters(model)
    save_adapter(model, out)
    return model


def test_it_comes_back_with_the_adapter_and_is_merged(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = trained(base, tmp_path / "adapter")
    loaded, _ = load_trained(tmp_path / "adapter")
    assert max_positions(loaded.config) == 256
    assert torch.equal(logits(loaded), logits(model))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() <= LOGITS_TOLERANCE
    assert max_positions(merged.config) == 256


def test_another_one_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "scaled")
    trained(base, tmp_path / "plain", rope=None)
    dense: dict[str, Any] = {"quantization": "none", "compute_dtype": torch.float32}
    for directory, rope, message in (
        (
            "scaled",
            None,
            r"trained with \{'rope_type': 'yarn'.* loaded with its own; load .*`rope_parameters=\{",
        ),
        ("scaled", SETTINGS["linear"], "loaded with {'rope_type': 'linear'"),
        ("plain", YARN, "trained with the RoPE of its base model.*`rope_parameters=None`"),
    ):
        with pytest.raises(AdapterError, match=message):
            load_adapter(load_model(str(base), rope_parameters=rope, **dense), tmp_path / directory)
    # Whoever has given it: here transformers.
    own = transformers_own(model_with(YARN), tiny_config(num_layers=2), YARN | {"rope_theta": 10000.0})
    load_adapter(own, tmp_path / "scaled")


def test_an_evaluation_takes_that_of_the_adapter(tmp_path: Path) -> None:
    def saved(name: str, base: dict[str, Any]) -> Path:
        (tmp_path / name).mkdir()
        settings = {"format_version": 1, "adapter": LORA.model_dump(mode="json"), "base": base}
        (tmp_path / name / "ssmlora.json").write_text(json.dumps(settings))
        return tmp_path / name

    plain, scaled = run_config(), with_recorded_rope(run_config(), saved("yarn", {"rope_parameters": YARN}))
    assert scaled.model.rope_parameters is not None
    assert scaled.model.rope_parameters.given == YARN
    assert with_recorded_rope(scaled, tmp_path / "yarn") == scaled
    assert with_recorded_rope(plain, saved("none", {"rope_parameters": None})) == plain
    assert with_recorded_rope(scaled, saved("unknown", {})) == scaled
    with pytest.raises(
        AdapterError, match=r"model\.rope_parameters: .*\"yarn\".* trained with null; remove it"
    ):
        with_recorded_rope(scaled, tmp_path / "none")
    with pytest.raises(ModelError, match=r"ssmlora\.json: base\.rope_parameters\.factor: .*correct it"):
        with_recorded_rope(plain, saved("damaged", {"rope_parameters": YARN | {"factor": "far"}}))
