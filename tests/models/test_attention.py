"""Which attention implementation is taken where."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import load_config
from ssmlora_dist.models import loading as loading_module
from ssmlora_dist.models.loading import attention_implementation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def choose(attention: Any, model_type: str, device: torch.device, dtype: torch.dtype) -> str:
    return attention_implementation(attention, load_config(config={"model_type": model_type}), device, dtype)


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", "llama", CPU, torch.bfloat16) == "sdpa"
    assert choose("auto", "gemma2", CPU, torch.bfloat16) == "eager"
    installed = {"flash_attn": object()}
    monkeypatch.setattr(loading_module.importlib.util, "find_spec", installed.get)
    assert choose("auto", "llama", CUDA, torch.bfloat16) == "flash_attention_2"
    assert choose("auto", "gemma2", CUDA, torch.bfloat16) == "flash_attention_2"
    assert choose("auto", "llama", CUDA, torch.float32) == "sdpa"
    assert choose("auto", "llama", CPU, torch.bfloat16) == "sdpa"
    installed.clear()
    assert choose("auto", "llama", CUDA, torch.bfloat16) == "sdpa"


def test_flash_attention_asked_for_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module.importlib.util, "find_spec", lambda name: None)
    for device, dtype, reason in (
        (CPU, torch.bfloat16, "needs a CUDA device"),
        (CUDA, torch.float32, "16 bits"),
        (CUDA, torch.bfloat16, "flash-attn, which is not installed"),
    ):
        with pytest.raises(ModelError, match=rf"model\.attention: flash_attention_2 .*{reason}"):
            choose("flash_attention_2", "llama", device, dtype)


def test_sdpa_asked_for_where_it_would_be_wrong() -> None:
    with pytest.raises(
        ModelError, match=r"model\.attention: .*does not run gemma2 models with sdpa, .*a cap of its logits"
    ):
        choose("sdpa", "gemma2", CPU, torch.bfloat16)
