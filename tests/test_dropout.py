"""Dropout of a whole model: a seed for each token decides it, checkpointed, in stages and in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.batches import Batch
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.stage import PipelineStage, StageLayers, cut_to_stage
from tests.tiny import FAMILY_NAMES, adapted_model, dropout_seeds, token_ids

NUM_LAYERS = 4
TOKENS = token_ids(2, 9)
INPUTS = {
    "input_ids": TOKENS,
    "position_ids": torch.arange(9).expand(2, 9),
}
CONFIGS = {
    "ssmlora": AdapterConfig(rank=4, dropout=0.3, every_layer=("down_proj",)),
    "lora": AdapterConfig(rank=4, dropout=0.3, method="lora", every_layer=("k_proj", "up_proj")),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config: AdapterConfig, model_type: str = "llama") -> Any:
    return adapted_model(model_type, config, num_layers=NUM_LAYERS).train()


def loss_of(model: Any, seed: int | None) -> Tensor:
    drawn = {} if seed is None else {"dropout_seeds": dropout_seeds([seed, seed + 1], 9)}
    return CausalLMLoss(model, chunk_size=8)(Batch.of(TOKENS, **INPUTS, **drawn))


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@configs
@pytest.mark.parametrize("model_type", FAMILY_NAMES)
def test_the_seeds_reach_the_adapters_of_every_family(model_type: str, config: AdapterConfig) -> None:
    model = model_of(config, model_type)
    generator_state = torch.get_rng_state()
    first, other, again = (loss_of(model, seed).detach() for seed in (11, 13, 11))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), generator_state), "a random number was drawn"
    model.eval()
    assert torch.equal(loss_of(model, 11), loss_of(model, 13))


@configs
def test_without_seeds_torchs_generator_decides(config: AdapterConfig) -> None:
    model = model_of(config)
    torch.manual_seed(3)
    first, other = loss_of(model, None), loss_of(model, None)
    torch.manual_seed(3)
    assert torch.equal(loss_of(model, None), first)
    assert not torch.equal(first, other)
    generator_state = torch.get_rng_state()
    loss_of(model.eval(), None)
    assert torch.equal(torch.get_rng_state(), generator_state)


@configs
@pytest.mark.parametrize("seed", [11, None])
def test_i2_a_recompute_drops_the_same(config: AdapterConfig, seed: int | None) -> None:
    results = []
    for switch in (lambda _: None, checkpoint_layers):
        model = model_of(config)
        switch(model)
        torch.manual_seed(3)
        loss = loss_of(model, seed)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert [name for name, tensor in results[0].items() if not torch.equal(tensor, results[1][name])] == []


@configs
def test_a_row_drops_the_same_alone_and_in_a_batch(config: AdapterConfig) -> None:
    # In float64, where sums of another order do not matter.
    tolerance = 1e-12
    model = adapted_model("llama", config, num_layers=NUM_LAYERS, dtype=torch.float64).train()
    decoder = model.get_decoder()
    seeds = dropout_seeds([11, 12], 9)
    together = decoder(**INPUTS, dropout_seeds=seeds, use_cache=False).last_hidden_state
    for row in range(2):
        inputs = {name: tensor[row : row + 1] for name, tensor in INPUTS.items()}
        alone = decoder(**inputs, dropout_seeds=seeds[row : row + 1], use_cache=False).last_hidden_state
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=tolerance)


def stage_of(config: AdapterConfig, first: int, stop: int) -> PipelineStage:
    model = model_of(config)
    stage = StageLayers(first, stop, NUM_LAYERS)
    cut_to_stage(model, stage)
    return PipelineStage(model, stage, chunk_size=8).train()


@configs
@pytest.mark.parametrize("cut", range(1, NUM_LAYERS))
def test_i3_stages_drop_what_the_whole_model_does(config: AdapterConfig, cut: int) -> None:
    batch = Batch.of(TOKENS, **INPUTS, dropout_seeds=dropout_seeds([11, 12], 9))
    whole = model_of(config)
    expected = loss_of(whole, 11)
    expected.backward()
    first, last = stage_of(config, 0, cut), stage_of(config, cut, NUM_LAYERS)
    sent = first(None, batch)
    received = sent.detach().requires_grad_()
    loss = last(received, batch)
    loss.backward()
    sent.backward(received.grad)
    assert torch.equal(loss, expected)
    got = {**gradients(first.model), **gradients(last.model)}
    wanted = gradients(whole)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
