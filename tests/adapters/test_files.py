"""Adapter directories: what is written, and what is refused with the place and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.adapters.files import FORMAT_VERSION, read_adapter, read_base, write_adapter
from ssmlora_dist.errors import AdapterError

SEED = 8
NUM_LAYERS = 4
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
WHERE = ("model.layers", (LINEARS,) * NUM_LAYERS)
CONFIG = AdapterConfig(
    rank=2, alpha=3.0, dropout=0.1, every_layer=("o_proj",), carry="raw", state_dtype="float32"
)
LORA = AdapterConfig(method="lora", rank=2, alternate=("q_proj", "v_proj"), every_layer=("up_proj",))
BASE = {"path": "org/base", "compute_dtype": "float32", "tokenizer": None}
WEIGHTS, PEFT, SETTINGS = "adapter_model.safetensors", "adapter_config.json", "ssmlora.json"


def lora_tensors(placed: dict[str, list[int]]) -> dict[str, Tensor]:
    """LoRA matrices of some projections in some layers."""
    generator = torch.Generator().manual_seed(SEED)
    return {
        f"model.layers.{layer}.self_attn.{projection}.lora_{which}.weight": torch.randn(
            shape, generator=generator
        )
        for projection, layers in placed.items()
        for layer in layers
        for which, shape in (("A", (2, 6)), ("B", (6, 2)))
    }


ALTERNATING = {"q_proj": [0, 2], "v_proj": [1, 3], "up_proj": [0, 1, 2, 3]}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory of ours."""
    write_adapter(tmp_path, CONFIG, lora_tensors(ALTERNATING), base=BASE, base_fingerprint="f00d" * 16)
    return tmp_path


@pytest.fixture
def peft_directory(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory as PEFT writes it: no settings of ours."""

    def make(placed: dict[str, list[int]], **settings: Any) -> Path:
        content = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
            "bias": "none",
        } | settings
        (tmp_path / PEFT).write_text(json.dumps(content))
        keyed = {f"base_model.model.{name}": tensor for name, tensor in lora_tensors(placed).items()}
        save_file(keyed, tmp_path / WEIGHTS)
        return tmp_path

    return make


def test_what_is_written_is_read_bitwise(saved: Path) -> None:
    adapter = read_adapter(saved, *WHERE)
    tensors = lora_tensors(ALTERNATING)
    assert adapter.config == CONFIG
    assert (adapter.base, adapter.base_fingerprint) == (BASE, "f00d" * 16)
    assert read_base(saved) == BASE
    assert adapter.tensors.keys() == tensors.keys()
    assert all(torch.equal(adapter.tensors[name], tensors[name]) for name in tensors)


def test_the_layout_is_that_of_peft(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [PEFT, WEIGHTS, SETTINGS]
    assert set(load_file(saved / WEIGHTS)) == {
        f"base_model.model.{name}" for name in lora_tensors(ALTERNATING)
    }
    peft = json.loads((saved / PEFT).read_text())
    assert (peft["peft_type"], peft["r"], peft["lora_alpha"]) == ("SSMLORA", 2, 3.0)
    assert peft["base_model_name_or_path"] == "org/base"
    settings = json.loads((saved / SETTINGS).read_text())
    assert settings["format_version"] == FORMAT_VERSION == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AdapterConfig(method="lora", alternate=(), every_layer=("q_proj", "v_proj")), ["q_proj", "v_proj"]),
        (
            LORA,
            [
                *(f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 2)),
                *(f"model.layers.{layer}.self_attn.up_proj" for layer in range(4)),
                *(f"model.layers.{layer}.self_attn.v_proj" for layer in (1, 3)),
            ],
        ),
    ],
    ids=["every_layer", "alternate"],
)
def test_plain_lora_names_its_modules_for_peft(
    tmp_path: Path, config: AdapterConfig, expected: list[str]
) -> None:
    write_adapter(tmp_path, config, lora_tensors(ALTERNATING))
    peft = json.loads((tmp_path / PEFT).read_text())
    assert peft["peft_type"] == "LORA"
    assert sorted(peft["target_modules"]) == sorted(expected)


def test_writing_again_replaces_what_was_there(saved: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in lora_tensors({"q_proj": [0]}).items()}
    write_adapter(saved, LORA, tensors)
    adapter = read_adapter(saved, *WHERE)
    assert adapter.config == LORA
    assert adapter.base_fingerprint is None
    assert {name: tensor.tolist() for name, tensor in adapter.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert len(list(saved.iterdir())) == 3


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def set_setting(directory: Path, file: str, **values: Any) -> None:
    content = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(content | values))


def pickle_only(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04N.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / WEIGHTS).unlink(), f"holds no {WEIGHTS}; copy or train it again"),
        (
            pickle_only,
            f"holds no {WEIGHTS}; adapter_model.bin is a pickle and is not read: save it again",
        ),
        (
            lambda d: cut(d / WEIGHTS, 300),
            f"{WEIGHTS}: not a whole safetensors file .*copy or train it again",
        ),
        (lambda d: cut(d / WEIGHTS, 0), f"{WEIGHTS}: not a whole safetensors file"),
        (lambda d: cut(d / WEIGHTS, -4), f"{WEIGHTS}: not a whole safetensors file"),
        (lambda d: cut(d / SETTINGS, 40), f"{SETTINGS}: not JSON .*the file is damaged"),
        (
            lambda d: (d / SETTINGS).write_bytes(b"\xff\xfe\x00"),
            f"{SETTINGS}: not JSON .*the file is damaged",
        ),
        (lambda d: (d / SETTINGS).write_text("[1]"), f"{SETTINGS}: not a JSON object; the file is damaged"),
        (
            lambda d: set_setting(d, SETTINGS, format_version=2),
            f"{SETTINGS}: format version 2, this release reads 1; use the release that wrote it",
        ),
        (lambda d: set_setting(d, SETTINGS, format_version=None), f"{SETTINGS}: format version None"),
        (lambda d: set_setting(d, SETTINGS, adapter=None), f"{SETTINGS}: .*damaged"),
        (lambda d: set_setting(d, SETTINGS, adapter={"rnak": 8}), f"{SETTINGS}: adapter.rnak: .*damaged"),
        (lambda d: (d / SETTINGS).unlink(), f"{PEFT}: peft_type is 'SSMLORA'; without {SETTINGS} only LORA"),
        (
            lambda d: [(d / name).unlink() for name in (SETTINGS, PEFT)],
            f"{PEFT}: missing; this is no adapter directory",
        ),
    ],
)
def test_a_damaged_directory_is_refused_with_place_and_remedy(
    saved: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(saved)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(saved, *WHERE)
    assert str(caught.value).startswith(str(saved))


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match="nowhere: no such adapter directory; train one first, or correct the path"
    ):
        read_adapter(tmp_path / "nowhere", *WHERE)


@pytest.mark.parametrize(
    ("placed", "alternate", "every_layer"),
    [
        ({"q_proj": [0, 1, 2, 3], "v_proj": [0, 1, 2, 3]}, (), {"q_proj", "v_proj"}),
        ({"q_proj": [0, 2], "v_proj": [1, 3]}, ("q_proj", "v_proj"), set()),
        ({"q_proj": [1, 3], "v_proj": [0, 2]}, ("v_proj", "q_proj"), set()),
        (
            {"q_proj": [0, 3], "k_proj": [1], "v_proj": [2], "o_proj": [0, 1, 2, 3]},
            ("q_proj", "k_proj", "v_proj"),
            {"o_proj"},
        ),
    ],
)
def test_the_placement_of_a_directory_of_peft_is_found(
    peft_directory: Callable[..., Path],
    placed: dict[str, list[int]],
    alternate: tuple[str, ...],
    every_layer: set[str],
) -> None:
    adapter = read_adapter(peft_directory(placed, base_model_name_or_path="org/base"), *WHERE)
    assert adapter.config.method == "lora"
    assert adapter.config.alternate == alternate
    assert set(adapter.config.every_layer) == every_layer
    assert (adapter.config.rank, adapter.config.scaling) == (2, 2.0)
    assert (adapter.base, adapter.base_fingerprint) == ({"path": "org/base"}, None)


EVERYWHERE = {"q_proj": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("placed", "settings", "message"),
    [
        (
            {"q_proj": [0, 1, 2, 3, 4]},
            {},
            "holds an adapter of layer 4; the model has 4 layers; it was saved",
        ),
        ({}, {}, "holds no LoRA of a decoder layer"),
        (
            EVERYWHERE,
            {"peft_type": "IA3"},
            "peft_type is 'IA3'; without ssmlora.json only LORA can be loaded",
        ),
        (EVERYWHERE, {"use_dora": True}, "use_dora is True, which is not supported here; allowed: False"),
        (EVERYWHERE, {"modules_to_save": ["lm_head"]}, "'lm_head', and the weights .* hold no such module"),
        (EVERYWHERE, {"ensure_weight_tying": True}, "ensure_weight_tying is True"),
        (EVERYWHERE, {"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}"),
        (EVERYWHERE, {"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is {'q_proj': 4}"),
        (
            EVERYWHERE,
            {"bias": "lora_only"},
            "bias is 'lora_only', which is not supported here; allowed: 'none'",
        ),
        (EVERYWHERE, {"lora_bias": True}, "lora_bias is True"),
        (EVERYWHERE, {"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        (EVERYWHERE, {"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        (EVERYWHERE, {"layer_replication": [[0, 2], [1, 4]]}, "layer_replication is"),
        (EVERYWHERE, {"target_parameters": ["mlp.weight"]}, "target_parameters is"),
        (EVERYWHERE, {"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        (EVERYWHERE, {"use_qalora": True}, "use_qalora is True"),
        (
            EVERYWHERE,
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changes the base",
        ),
        (EVERYWHERE, {"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        (EVERYWHERE, {"r": None}, f"{PEFT}: r is None"),
        (EVERYWHERE, {"lora_alpha": "much"}, f"{PEFT}: r is 2, lora_alpha is 'much'"),
        (EVERYWHERE, {"r": -1}, f"{PEFT}: r is -1"),
    ],
)
def test_what_peft_can_do_and_this_cannot_is_refused(
    peft_directory: Callable[..., Path],
    placed: dict[str, list[int]],
    settings: dict[str, Any],
    message: str,
) -> None:
    directory = peft_directory(placed, **settings)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(directory, *WHERE)
    assert str(directory / PEFT) in str(caught.value)


@pytest.mark.parametrize(
    ("placed", "config"),
    [
        ({"q_proj": [0, 1]}, {"every_layer": ("q_proj",), "layers": (0, 1)}),
        ({"q_proj": [3], "v_proj": [3]}, {"every_layer": ("q_proj", "v_proj"), "layers": (3,)}),
        ({"q_proj": [2], "v_proj": [3]}, {"alternate": ("q_proj", "v_proj"), "layers": (2, 3)}),
        ({"q_proj": [3], "v_proj": [2]}, {"alternate": ("v_proj", "q_proj"), "layers": (2, 3)}),
        (
            {"q_proj": [3], "v_proj": [1], "k_proj": [2], "o_proj": [1, 2, 3]},
            {"alternate": ("v_proj", "k_proj", "q_proj"), "every_layer": ("o_proj",), "layers": (1, 2, 3)},
        ),
    ],
)
def test_which_layers_peft_has_adapted_is_found(
    peft_directory: Callable[..., Path], placed: dict[str, list[int]], config: dict[str, Any]
) -> None:
    found = read_adapter(peft_directory(placed), *WHERE).config
    assert found == AdapterConfig(method="lora", rank=2, alpha=4, **({"alternate": ()} | config))


def test_what_is_no_pattern_are_places(peft_directory: Callable[..., Path]) -> None:
    found = read_adapter(peft_directory({"v_proj": [2, 0], "q_proj": [3, 0]}), *WHERE).config
    places = ("0.q_proj", "3.q_proj", "0.v_proj", "2.v_proj")
    assert set(found.places) == set(places)
    assert found == AdapterConfig(method="lora", rank=2, alpha=4, places=found.places)


def test_places_are_written_for_peft(tmp_path: Path) -> None:
    config = AdapterConfig(method="lora", rank=2, places=("0.v_proj", "2.q_proj"))
    # As it is given, and as `resolve` makes it.
    for each in (config, config.model_copy(update={"alternate": ()})):
        write_adapter(tmp_path, each, lora_tensors({"v_proj": [0], "q_proj": [2]}))
        peft = json.loads((tmp_path / PEFT).read_text())
        assert peft["target_modules"] == [
            f"model.layers.{n}_proj" for n in ("0.self_attn.v", "2.self_attn.q")
        ]
        assert (peft["peft_type"], peft["layers_to_transform"]) == ("LORA", None)
        assert read_adapter(tmp_path, *WHERE).config == each


def test_the_chosen_layers_are_written_for_peft(tmp_path: Path) -> None:
    dense = AdapterConfig(method="lora", rank=2, alternate=(), every_layer=("q_proj",), layers="-2:")
    write_adapter(tmp_path, dense, lora_tensors({"q_proj": [2, 3]}))
    peft = json.loads((tmp_path / PEFT).read_text())
    assert (peft["target_modules"], peft["layers_to_transform"]) == (["q_proj"], [2, 3])
    in_turn = AdapterConfig(method="lora", rank=2, layers="-2:")
    write_adapter(tmp_path, in_turn, lora_tensors({"q_proj": [2], "v_proj": [3]}))
    peft = json.loads((tmp_path / PEFT).read_text())
    assert peft["target_modules"] == [f"model.layers.{n}_proj" for n in ("2.self_attn.q", "3.self_attn.v")]
    assert peft["layers_to_transform"] is None


@pytest.mark.parametrize(
    "settings",
    [
        {
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "lora_bias": False,
        },
        {"bias": None, "init_lora_weights": True, "layer_replication": None, "use_qalora": False},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_features_that_are_named_and_not_used_are_no_obstacle(
    peft_directory: Callable[..., Path], settings: dict[str, Any]
) -> None:
    assert read_adapter(peft_directory(EVERYWHERE, **settings), *WHERE).config.every_layer == ("q_proj",)


def test_rank_stabilised_scaling_is_carried_over(peft_directory: Callable[..., Path]) -> None:
    config = read_adapter(peft_directory(EVERYWHERE, use_rslora=True), *WHERE).config
    assert (config.alpha, config.rslora, config.scaling) == (4, True, 4 / 2**0.5)


def rename_keys(directory: Path, rename: Callable[[str], str]) -> None:
    tensors = {rename(key): tensor.clone() for key, tensor in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("name", ["default", "my_adapter"])
def test_keys_with_the_name_of_the_adapter_are_read(peft_directory: Callable[..., Path], name: str) -> None:
    directory = peft_directory(EVERYWHERE)
    expected = read_adapter(directory, *WHERE)
    rename_keys(directory, lambda key: key.replace(".weight", f".{name}.weight"))
    found = read_adapter(directory, *WHERE)
    assert found.config == expected.config
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[key], expected.tensors[key]) for key in expected.tensors)


def test_several_adapters_in_one_file_are_refused(peft_directory: Callable[..., Path]) -> None:
    directory = peft_directory(EVERYWHERE)
    tensors = load_file(directory / WEIGHTS)
    both = {
        key.replace(".weight", f".{name}.weight"): t.clone() for name in "xy" for key, t in tensors.items()
    }
    save_file(both, directory / WEIGHTS)
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: holds several adapters: x, y; "):
        read_adapter(directory, *WHERE)


def add_tensor(directory: Path, name: str, tensor: Tensor) -> Path:
    save_file(load_file(directory / WEIGHTS) | {name: tensor}, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.lm_head.lora_A.weight", "an adapter of lm_head, which is no linear layer of a"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "an adapter of model.embed_tokens, which"),
        ("base_model.model.model.embed_tokens.lora_embedding_A.default", "an adapter of model.embed_tokens,"),
        ("base_model.model.model.norm.weight", "model.norm.weight, which is no part of an adapter"),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            "q_proj.base_layer.weight, which is no part of an adapter",
        ),
    ],
)
def test_what_is_adapted_outside_of_decoder_layers_is_named(
    peft_directory: Callable[..., Path], name: str, message: str
) -> None:
    directory = add_tensor(peft_directory(EVERYWHERE), name, torch.zeros(2, 6))
    with pytest.raises(AdapterError, match=message):
        read_adapter(directory, *WHERE)


Q_PROJ = "model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(0), r"q_proj\.lora_B\.weight is empty.*ZeRO 3"),
        (torch.full((6, 2), torch.nan), r"q_proj\.lora_B\.weight holds numbers that are not finite"),
    ],
)
def test_tensors_that_say_nothing(
    tensor: Tensor, message: str, ours: bool, peft_directory: Callable[..., Path]
) -> None:
    directory = peft_directory(EVERYWHERE)
    if ours:
        lora = AdapterConfig(method="lora", rank=2, alternate=(), every_layer=("q_proj",))
        write_adapter(directory, lora, lora_tensors(EVERYWHERE))
    add_tensor(directory, f"base_model.model.{Q_PROJ}", tensor)
    with pytest.raises(AdapterError, match=rf"adapter_model\.safetensors: .*{message}"):
        read_adapter(directory, *WHERE)


def test_sharded_parameters_are_not_saved(tmp_path: Path) -> None:
    tensors = lora_tensors(ALTERNATING) | {Q_PROJ: torch.zeros(0)}
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight is empty.*ZeRO 3"):
        write_adapter(tmp_path / "adapter", LORA, tensors)
    assert not (tmp_path / "adapter").exists()


def test_the_revision_that_peft_records_is_that_of_the_base(peft_directory: Callable[..., Path]) -> None:
    directory = peft_directory(EVERYWHERE, base_model_name_or_path="org/base", revision="v2")
    assert read_base(directory) == {"path": "org/base", "revision": "v2"}
