"""`torch.compile` of adapted models: one graph, the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from ssmlora_dist import AdapterConfig
from ssmlora_dist.batches import Batch
from ssmlora_dist.models import decoder_layers, recompute
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.recompute import compile_layers
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


class Compiler:
    """In the place of inductor: notes the operators of every graph, and runs them one by one."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=self._note)(graph, inputs)

    def _note(self, graph: Any, _: Any) -> Any:
        self.graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)


def loss_and_gradients(model: Any) -> list[Tensor]:
    tokens = token_ids(2, 9)
    places = torch.arange(9).expand(2, 9)
    batch = Batch.of(tokens, input_ids=tokens, position_ids=places, dropout_seeds=dropout_seeds([7, 8], 9))
    loss = CausalLMLoss(model, chunk_size=8)(batch)
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


@pytest.mark.parametrize("layers_per_checkpoint", [None, 1, 2])
@pytest.mark.parametrize("backend", [None, pytest.param("inductor", marks=[pytest.mark.slow, has_compiler])])
def test_each_decoder_layer_is_compiled_as_one_graph(
    layers_per_checkpoint: int | None, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend or compiler))
    recompute._compiled_call.cache_clear()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 1)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    model = adapted_model(config=CONFIGS["mixed"], num_layers=NUM_LAYERS).train()
    if layers_per_checkpoint is not None:
        checkpoint_layers(model, layers_per_checkpoint=layers_per_checkpoint)
    expected = loss_and_gradients(model)
    compile_layers(list(decoder_layers(model).values()))
    counters.clear()
    for got, wanted in zip(loss_and_gradients(model), expected, strict=True):
        error = ((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)).item()
        assert error <= TOLERANCE, f"relative error {error:.1e}"
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == NUM_LAYERS
    recompute._compiled_call.cache_clear()
    if backend is None:
        # A forward and a backward graph of each layer.
        assert len(compiler.graphs) == 2 * NUM_LAYERS
        # Those of dropout: on the input of `down_proj`, and on what goes back to it.
        dropped = ("dropped_product", "dropped_weight_gradient", "add_dropped_gradient")
        for name in ("state_forward", "state_backward", *dropped):
            found = [graph.count(f"ssmlora.{name}.default") for graph in compiler.graphs]
            assert sorted(found) == [0] * NUM_LAYERS + [1] * NUM_LAYERS, name
        assert not any("ssmlora.dropout.default" in graph for graph in compiler.graphs)


@pytest.mark.slow  # compiles C++ for up to a minute
@has_compiler
def test_so_it_is_with_generated_code() -> None:
    assert_compiled_is_eager(CONFIGS["mixed"], "inductor")
