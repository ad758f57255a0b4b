"""Adapted models are pickled, copied and sent to other processes like any module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.batches import Batch
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from tests.tiny import (
    FAMILY_NAMES,
    QV_AND_MLP,
    adapted_model,
    dropout_seeds,
    layers_of,
    randomize_adapters,
    token_ids,
)

NUM_LAYERS = 2
TIMEOUT_SECONDS = 120
TOKENS = token_ids(2, 7)
CONFIGS = {
    "lora": AdapterConfig(rank=4, method="lora", every_layer=("k_proj",), dropout=0.2),
    "ssmlora": QV_AND_MLP,
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def saved_by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch": saved_by_torch,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def loss_and_gradients(model: Any) -> list[Tensor]:
    seeds = dropout_seeds([3, 4], TOKENS.shape[1])
    loss = CausalLMLoss(model.train(), chunk_size=4)(Batch.of(TOKENS, input_ids=TOKENS, dropout_seeds=seeds))
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    model.eval()
    return [loss.detach(), *gradients]


def assert_a_copy(copied: Any, model: Any) -> None:
    """It computes the same, and goes its own way from here."""
    assert torch.equal(logits(copied), logits(model))
    trained = loss_and_gradients(model)
    for got, wanted in zip(loss_and_gradients(copied), trained, strict=True):
        assert torch.equal(got, wanted)
    assert {n for n, p in copied.named_parameters() if p.requires_grad} == set(adapter_parameters(model))
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    assert not set(copied.modules()) & set(model.modules())
    before = logits(model)
    randomize_adapters(copied, seed=1)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copied), before)


@configs
@ways
@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("none", torch.float32),
        ("nf4", torch.float32),
        ("nf4", torch.bfloat16),
        ("int8", torch.bfloat16),
    ],
    ids=str,
)
def test_a_model_that_was_sent_and_read_again(
    config: AdapterConfig, way: Callable[[Any], Any], storage: str, dtype: torch.dtype
) -> None:
    model = adapted_model(config=config, quantization=storage, dtype=dtype, num_layers=NUM_LAYERS)
    checkpoint_layers(model)
    logits(model)
    assert_a_copy(way(way(model)), model)


@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_every_family(model_type: str) -> None:
    model = adapted_model(model_type, num_layers=NUM_LAYERS)
    model.generate(TOKENS, max_new_tokens=2, do_sample=False)
    assert_a_copy(WAYS["pickle"](model), model)


@configs
@ways
def test_a_layer_alone(config: AdapterConfig, way: Callable[[Any], Any]) -> None:
    for layer in layers_of(adapted_model(config=config, num_layers=NUM_LAYERS)):
        copied = way(layer)
        assert type(copied) is type(layer)
        assert set(copied.adapters) == {m for m in copied.modules() if isinstance(m, LoRALinear)}
        for adapter in copied.adapters:
            assert set(adapter.readers) <= set(copied.adapters)


def answer(models: list[Any], queue: Any) -> None:
    """In a process of its own, which knows of no class that was made in another."""
    # As numbers: a tensor in shared memory would have to be fetched before the process ends.
    queue.put([logits(model).tolist() for model in models])


def test_another_process() -> None:
    models = [adapted_model(config=c, num_layers=NUM_LAYERS, quantization="nf4") for c in CONFIGS.values()]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(models, queue))
    process.start()
    answers = queue.get(timeout=TIMEOUT_SECONDS)
    process.join()
    assert all(
        torch.equal(torch.tensor(got), logits(model)) for got, model in zip(answers, models, strict=True)
    )
