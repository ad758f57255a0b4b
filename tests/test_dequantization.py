"""Under gradient checkpointing a quantised weight is dequantised twice a step, and one layer's at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ssmlora_dist.batches import Batch
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.quantization import QuantizedLinear
from tests.tiny import adapted_model, layers_of, token_ids

NUM_LAYERS = 4
# Sizes that fill whole elements of the storage and blocks of 64 weights.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_layers": NUM_LAYERS, "initializer_range": 0.1}


def model_of(mode: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    return adapted_model(quantization=mode, dtype=dtype, **SIZES).train()


def projections(model: Any) -> dict[QuantizedLinear, int]:
    """The quantised layers, each with its decoder layer."""
    return {
        module: index
        for index, layer in enumerate(layers_of(model))
        for module in layer.modules()
        if isinstance(module, QuantizedLinear)
    }


def step(model: Any) -> dict[str, Tensor]:
    """The loss, under the name `loss`, and all gradients, that of the embeddings' output among them."""
    reached: list[Tensor] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda *given: reached.append(given[-1].requires_grad_()))
    tokens = token_ids(2, 9)
    loss = CausalLMLoss(model, chunk_size=5)(Batch.of(tokens, input_ids=tokens))
    loss.backward()
    handle.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert reached[0].grad is not None
    return {"loss": loss.detach(), "embeddings": reached[0].grad, **gradients}


class Watch:
    """Counts what dequantises a weight, and looks which of the weights are alive."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[QuantizedLinear] = Counter()
        self.most_layers_alive = self.most_alive = 0
        self._alive: list[tuple[int, StorageWeakRef]] = []
        self._layer_of = projections(model)
        kinds = {type(module) for module in self._layer_of}
        for kind in kinds:
            self._watch(kind, monkeypatch)

    def _watch(self, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        dequantize, multiply, inside = kind.dequantize, kind.multiply, []

        def counted_dequantize(module: QuantizedLinear, packed: Tensor) -> Tensor:
            weight: Tensor = dequantize(module, packed)
            if not inside:
                self.counts[module] += 1
            self._alive.append((self._layer_of[module], StorageWeakRef(weight.untyped_storage())))
            self.look()
            return weight

        def counted_multiply(module: QuantizedLinear, *arguments: Any) -> Tensor:
            self.counts[module] += 1
            inside.append(module)
            output: Tensor = multiply(module, *arguments)
            inside.pop()
            return output

        monkeypatch.setattr(kind, "dequantize", counted_dequantize)
        monkeypatch.setattr(kind, "multiply", counted_multiply)

    def look(self) -> None:
        self._alive = [(layer, storage) for layer, storage in self._alive if not storage.expired()]
        self.most_alive = max(self.most_alive, len(self._alive))
        self.most_layers_alive = max(self.most_layers_alive, len({layer for layer, _ in self._alive}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8"])
def test_no_bit_differs(mode: str, dtype: torch.dtype) -> None:
    expected = step(model_of(mode, dtype))
    plainly = model_of(mode, dtype)
    checkpoint_layers(plainly)
    for module in projections(plainly):
        module.is_recomputed = False
    model = model_of(mode, dtype)
    checkpoint_layers(model)
    assert all(module.is_recomputed for module in projections(model))
    for other in (step(plainly), step(model)):
        assert other.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(other[name], expected[name])] == []


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_two_dequantisations_of_each_weight_in_a_step(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(mode)
    checkpoint_layers(model)
    watch = Watch(model, monkeypatch)
    step(model)
    assert dict(watch.counts) == dict.fromkeys(projections(model), 2)
    assert watch.most_layers_alive == 1, "the weights of one decoder layer at a time"
    assert watch.most_alive == len(projections(model)) // NUM_LAYERS
    watch.look()
    assert not watch._alive, "and none after the step"


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_layer_that_is_not_recomputed_keeps_no_weight(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(mode)
    # As a pipeline stage does that recomputes its last layers ahead.
    checkpoint_layers(model, num_kept=2)
    watch = Watch(model, monkeypatch)
    step(model)
    assert dict(watch.counts) == dict.fromkeys(projections(model), 2)
    assert watch.most_layers_alive == 1


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_without_a_recompute_nothing_is_kept(
    mode: str, is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(mode)
    if is_checkpointed:
        checkpoint_layers(model)
        # Layers in evaluation mode are not recomputed.
        model.eval()
    watch = Watch(model, monkeypatch)
    step(model)
    assert dict(watch.counts) == dict.fromkeys(projections(model), 2)
    assert watch.most_alive == 1
