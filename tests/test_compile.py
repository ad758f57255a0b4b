"""`torch.compile` of adapted models: one graph, the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.models.loss import checkpoint_layers
from tests.own_forms import Fading, Mixing
from tests.tiny import adapted_model, dropout_seeds, token_ids

NUM_LAYERS = 2
CONFIGS = {
    "ssmlora": AdapterConfig(
        rank=4, every_layer=("gate_proj", "up_proj"), every_layer_method="ssmlora", dropout=0.2
    ),
    "mixed": AdapterConfig(rank=4, every_layer=("down_proj",), dropout=0.2),
    "lora": AdapterConfig(rank=4, method="lora", alternate=(), every_layer=("q_proj", "k_proj", "v_proj")),
    "gated and constant": AdapterConfig(
        rank=4,
        method="gated",
        every_layer=("up_proj",),
        every_layer_method="constant",
        dropout=0.2,
        modules_to_save=("embed_tokens", "norm", "input_layernorm", "lm_head"),
    ),
    "forms of a reference alone": AdapterConfig(
        rank=4, method=Mixing.name, every_layer=("up_proj",), every_layer_method=Fading.name, dropout=0.2
    ),
}
# Float32, relative to the largest number of a tensor: a compiler fuses and reorders.
TOLERANCE = 1e-5
has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def results(run: Any, model: Any) -> list[Tensor]:
    """Logits and every gradient; then logits without a graph."""
    inputs = {"input_ids": token_ids(2, 9), "use_cache": False, "dropout_seeds": dropout_seeds([7, 8], 9)}
    logits = run(**inputs).logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.square().mean(), parameters)
    with torch.no_grad():
        return [logits.detach(), *gradients, run(**inputs).logits]


def assert_compiled_is_eager(config: AdapterConfig, backend: str, checkpointing: bool = False) -> None:
    model = adapted_model(config=config, num_layers=NUM_LAYERS).train()
    if checkpointing:
        checkpoint_layers(model)
    expected = results(model, model)
    compiled = results(torch.compile(model, backend=backend, fullgraph=True), model)
    for got, wanted in zip(compiled, expected, strict=True):
        error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()
        assert error <= TOLERANCE, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mixed"])
def test_a_compiled_model_is_one_graph_and_computes_the_same(name: str) -> None:
    assert_compiled_is_eager(CONFIGS[name], "aot_eager")


def test_so_it_is_with_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer hands its adapters what they share in a thread-local, and takes it back: nothing to replay.
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    assert_compiled_is_eager(CONFIGS["mixed"], "aot_eager", checkpointing=True)


@pytest.mark.slow  # compiles C++ for up to a minute
@has_compiler
def test_so_it_is_with_generated_code() -> None:
    assert_compiled_is_eager(CONFIGS["mixed"], "inductor")
