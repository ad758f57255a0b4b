"""Invariant I11: a packed row gives what its samples give alone, dropout included, for tested decoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.projections import EXPERTS
from ssmlora_dist.batches import Batch
from ssmlora_dist.data import Example, collate
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models import empty_model, load_config, load_model
from ssmlora_dist.models.attention import packing_obstacle, rows_of, segment_attention
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from tests.decoders import TESTED, bare_config
from tests.tiny import SEED, randomize_adapters, tiny_config, token_ids

from .test_any_decoder import adapter_config, assert_same, base_model

# The first is longer than the window of layers that have one, the second than a token and not than it.
SAMPLES = [
    Example.from_tokens(token_ids(1, n, seed=n)[0].tolist(), [i >= n // 3 for i in range(n)])
    for n in (11, 4, 7)
]
DROPOUT_SEEDS = (11, 2**40 + 7, -5)
PAD = 0
# Float32: the same sums, of products of other shapes. Relative to the largest gradient of all.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-5


def packed(samples: list[Example] = SAMPLES) -> Batch:
    """Two rows: the first of all samples, the other of one, padded."""
    seeds = [DROPOUT_SEEDS, DROPOUT_SEEDS[:1]]
    return collate([samples, samples[:1]], PAD, seeds)


def alone() -> list[Batch]:
    pairs = [*zip(SAMPLES, DROPOUT_SEEDS, strict=True), (SAMPLES[0], DROPOUT_SEEDS[0])]
    return [collate([[sample]], PAD, [[seed]]) for sample, seed in pairs]


def adapted(model_type: str, quantization: str, *, is_checkpointed: bool) -> Any:
    model = copy.deepcopy(base_model(model_type, quantization))
    add_adapters(model, adapter_config(model).model_copy(update={"dropout": 0.3}))
    randomize_adapters(model)
    if is_checkpointed:
        checkpoint_layers(model, layers_per_checkpoint=3, offload=True)
    return model


def trained(model: Any, batches: list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    module = CausalLMLoss(model.train(), chunk_size=5)
    losses = [module(batch) for batch in batches]
    torch.stack(losses).sum().backward()
    named = adapter_parameters(model)
    return torch.stack(losses).detach().sum(), {
        name: p.grad for name, p in named.items() if p.grad is not None
    }


def logits(model: Any, batch: Batch) -> Tensor:
    segment_attention(model)
    with torch.no_grad(), rows_of(batch, model) as inputs:
        found: Tensor = model(**inputs, use_cache=False).logits
    return found


@pytest.mark.parametrize("model_type", TESTED)
def test_i11_a_packed_row_is_its_samples(model_type: str) -> None:
    for quantization in ("none", "nf4"):
        plain, checkpointed, one_by_one = (
            adapted(model_type, quantization, is_checkpointed=is_on) for is_on in (False, True, False)
        )
        loss, gradients = trained(plain, [packed()])
        again, recomputed = trained(checkpointed, [packed()])
        assert torch.equal(again, loss)
        assert_same(recomputed, gradients)
        expected, wanted = trained(one_by_one, alone())
        torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
        assert gradients.keys() == wanted.keys()
        largest = max(gradient.abs().max() for gradient in wanted.values())
        for name, gradient in wanted.items():
            error = ((gradients[name] - gradient).abs().max() / largest).item()
            assert error <= GRADIENT_TOLERANCE, f"{quantization}, {name}: {error:.1e}"


@pytest.mark.parametrize("model_type", TESTED)
def test_no_sample_sees_another(model_type: str) -> None:
    model = adapted(model_type, "none", is_checkpointed=False).eval()
    before = logits(model, packed())
    other = Example.from_tokens([5, 6, 7, 8], [False, True, True, True])
    after = logits(model, packed([SAMPLES[0], other, SAMPLES[2]]))
    first, second = SAMPLES[0].num_tokens, SAMPLES[0].num_tokens + other.num_tokens
    for kept, again in ((before[:, :first], after[:, :first]), (before[0, second:], after[0, second:])):
        if any(hasattr(module, EXPERTS) for module in model.modules()):
            # How many tokens share an expert's product depends on all samples, and on it how it is rounded.
            torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(again, kept)
    assert not torch.equal(after[0, first:second], before[0, first:second])


@pytest.mark.parametrize("model_type", TESTED)
def test_every_tested_decoder_keeps_samples_apart(model_type: str) -> None:
    config = load_config(config=bare_config(model_type))
    sdpa = type(empty_model(config))._supports_sdpa
    assert packing_obstacle(config, "sdpa" if sdpa else "eager") is None


@pytest.mark.parametrize(("model_type", "attention"), [("falcon", "sdpa"), ("mamba", "eager")])
def test_others_are_refused(model_type: str, attention: str) -> None:
    obstacle = packing_obstacle(load_config(config=bare_config(model_type)), attention)
    assert obstacle == "its attention is not made of transformers' attention functions"


def test_flash_attention_is_told_where_samples_begin() -> None:
    model = load_model(init="random", config=tiny_config("llama"), quantization="none", seed=SEED)
    model.config._attn_implementation = "flash_attention_2"
    with rows_of(packed(), model) as inputs:
        assert inputs["cu_seq_lens_q"].tolist() == [0, 11, 15, 22, 33, 44]
        assert inputs["cu_seq_lens_k"] is inputs["cu_seq_lens_q"]
        assert (inputs["max_length_q"], inputs["max_length_k"]) == (11, 11)
        assert "attention_mask" not in inputs


def test_attention_that_saw_no_rows_is_an_error() -> None:
    """Samples would have seen each other without a word."""
    model = load_model(init="random", config=tiny_config("llama"), quantization="none", seed=SEED)
    refused = pytest.raises(ModelError, match=r"data\.packing")
    with refused, rows_of(packed(), model):
        pass
    segment_attention(model)
    with refused, rows_of(packed(), model):
        pass


def test_layers_under_another_mask_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(init="random", config=tiny_config("llama"), quantization="none", seed=SEED)
    monkeypatch.setattr("ssmlora_dist.models.attention._is_causal", lambda *_: False)
    with pytest.raises(ModelError, match=r"data\.packing"):
        logits(model, packed())
    assert torch.equal(logits(model, alone()[0]), model(**alone()[0].inputs, use_cache=False).logits)
