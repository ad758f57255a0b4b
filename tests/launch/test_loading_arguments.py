"""How `launch/generate.py` and `launch/harness.py` load an adapter's base model, in process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist import AdapterConfig, add_adapters, save_adapter
from ssmlora_dist.config import build
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.models import load_model, load_tokenizer
from tests.tiny import tiny_model

from .materials import MODEL
from .processes import TRAIN_SCRIPT


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    tiny_model(num_layers=2, **{k: v for k, v in MODEL.items() if k != "model_type"}).save_pretrained(
        tmp_path / "base"
    )
    load_tokenizer("bytes").save_pretrained(tmp_path / "base")
    model = add_adapters(load_model(str(tmp_path / "base"), quantization="nf4"), AdapterConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def generate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "Hi", *arguments])
    return run_command(runpy.run_path(str(TRAIN_SCRIPT.with_name("generate.py")))["main"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"quantization": "nf4", "compute_dtype": "torch.bfloat16"}),
        (("--quantization", "none"), {"quantization": "none", "compute_dtype": "torch.bfloat16"}),
        (
            ("--quantization", "int8", "--dtype", "float32"),
            {"quantization": "int8", "compute_dtype": "torch.float32"},
        ),
    ],
)
def test_the_precision_of_the_base_model(
    arguments: tuple[str, ...], expected: dict[str, str], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: dict[str, Any] = {}

    def load(**settings: Any) -> Any:
        loaded.update(settings)
        return load_model(**settings)

    monkeypatch.setattr(build, "load_model", lambda **settings: load(**settings))
    assert generate(monkeypatch, "--adapter", str(adapter), "--max-new-tokens", "2", *arguments) == 0
    assert {key: str(loaded[key]) for key in expected} == expected


def test_more_tokens_than_the_model_has_positions(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(monkeypatch, "--adapter", str(adapter), "--max-new-tokens", "255") == 2
    assert "2 tokens and 255 new ones; allowed: at least 1, 256 in all" in capsys.readouterr().err
    assert generate(monkeypatch, "--adapter", str(adapter), "--model", "/nowhere") == 2
    assert "--model: there is no directory /nowhere" in capsys.readouterr().err
