"""Any decoder of transformers, at tiny random size: the invariants of DESIGN section 3, and loading."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters, remove_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.projections import shortest_name
from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import AdapterError, ModelError
from ssmlora_dist.models import decoder_layers, empty_model, load_config, load_model, structure_of
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.stage import PipelineStage, StageLayers, cut_to_stage
from ssmlora_dist.models.structure import check_layers
from ssmlora_dist.quantization import is_quantized
from tests.decoders import PAGE, REFUSED, TESTED, bare_config, page
from tests.tiny import SEED, dropout_seeds, randomize_adapters, token_ids

# Float32 logits of several units, with other shapes of the products.
TOLERANCE = 2e-5
# A micro-batch of another shape adds its gradients up in another order.
LOSS_TOLERANCE = 1e-5
BATCH, TOKENS = 2, 9
decoders = pytest.mark.parametrize("model_type", TESTED)


@functools.cache
def base_model(model_type: str, quantization: Any = "none") -> Any:
    """To be copied before it is changed."""
    config = bare_config(model_type)
    return load_model(
        init="random", config=config, quantization=quantization, compute_dtype=torch.float32, seed=SEED
    )


def adapter_config(model: Any, state_gradient: Any = "full") -> AdapterConfig:
    """Time modules in turn on two projections that all layers have, plain LoRA on all others."""
    paths = structure_of(model).linears
    attention = [path for path in paths[0] if path.rpartition(".")[0] == paths[0][0].rpartition(".")[0]]
    alternate = tuple(shortest_name(path, paths) for path in (attention[0], attention[-1]))
    return AdapterConfig(rank=4, alternate=alternate, every_layer="all-linear", state_gradient=state_gradient)


def adapted(model_type: str, state_gradient: Any = "full", quantization: Any = "none") -> Any:
    model = copy.deepcopy(base_model(model_type, quantization))
    add_adapters(model, adapter_config(model, state_gradient))
    randomize_adapters(model)
    return model


def logits(model: Any, tokens: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False, **inputs).logits
        return found


def batch() -> dict[str, Tensor]:
    tokens = token_ids(BATCH, TOKENS)
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(TOKENS).expand_as(tokens),
    }


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in sorted(adapter_parameters(model).items()) if p.grad is not None}


def assert_same(some: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert some.keys() == other.keys()
    assert [name for name in some if not torch.equal(some[name], other[name])] == []


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = batch()
    loss = CausalLMLoss(model.train(), chunk_size=5)(Batch.of(inputs["input_ids"], **inputs))
    loss.backward()
    return loss.detach(), gradients(model)


@decoders
def test_i1_a_fresh_adapter_changes_nothing(model_type: str) -> None:
    for quantization in ("none", "nf4"):
        base = base_model(model_type, quantization)
        model = copy.deepcopy(base)
        layer = decoder_layers(model)[0]
        assert any(map(is_quantized, layer.modules())) == (quantization != "none")
        add_adapters(model, adapter_config(model))
        tokens = token_ids(BATCH, TOKENS)
        assert torch.equal(logits(model, tokens), logits(base, tokens))
        assert logits(base, tokens).std() > 0.01


@decoders
def test_i2_checkpointing_changes_nothing(model_type: str) -> None:
    for state_gradient in ("full", "detached"):
        for quantization in ("none", "nf4"):
            plain, checkpointed = (adapted(model_type, state_gradient, quantization) for _ in range(2))
            # Three of four layers share a checkpoint, or none do.
            shared = 3 if (state_gradient == "full") == (quantization == "none") else 1
            checkpoint_layers(checkpointed, layers_per_checkpoint=shared, offload=shared == 3)
            loss, expected = trained(plain)
            again, found = trained(checkpointed)
            assert torch.equal(loss, again)
            assert_same(found, expected)
            assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "lora_" in name)


@decoders
def test_i3_two_stages_are_one(model_type: str) -> None:
    whole = adapted(model_type)
    loss, expected = trained(whole)
    num_layers = structure_of(whole).num_layers
    inputs = batch()
    pieces = []
    for stage in (StageLayers(0, 1, num_layers), StageLayers(1, num_layers, num_layers)):
        model = adapted(model_type).train()
        cut_to_stage(model, stage)
        pieces.append((model, PipelineStage(model, stage, 5)))
    (_, first), (_, last) = pieces
    sent = first(None, Batch.of(inputs["input_ids"], **inputs))
    received = sent.detach().requires_grad_()
    staged = last(received, Batch.of(inputs["input_ids"], **inputs))
    staged.backward()
    sent.backward(received.grad)
    assert torch.equal(staged.detach(), loss)
    assert_same({name: p for model, _ in pieces for name, p in gradients(model).items()}, expected)


@decoders
def test_i4_company_changes_nothing(model_type: str) -> None:
    model = adapted(model_type)
    rows = [token_ids(1, length, seed=length)[0] for length in (9, 5)]
    alone = [logits(model, row[None])[0] for row in rows]
    for side in ("right", "left"):
        padded, mask, positions = (torch.zeros(2, 9, dtype=torch.long) for _ in range(3))
        for index, row in enumerate(rows):
            columns = slice(0, len(row)) if side == "right" else slice(9 - len(row), 9)
            padded[index, columns], mask[index, columns] = row, 1
            positions[index, columns] = torch.arange(len(row))
        together = logits(model, padded, attention_mask=mask, position_ids=positions)
        for index in range(len(rows)):
            torch.testing.assert_close(
                together[index][mask[index] == 1], alone[index], rtol=TOLERANCE, atol=TOLERANCE
            )


@decoders
def test_i5_cached_generation_is_the_full_pass(model_type: str) -> None:
    model = adapted(model_type)
    tokens = token_ids(BATCH, TOKENS)
    with torch.no_grad():
        begun = model(tokens[:, :6], use_cache=True)
        steps, cache = [begun.logits], begun.past_key_values
        for index in range(6, TOKENS):
            step = model(tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, tokens), rtol=TOLERANCE, atol=TOLERANCE)


@decoders
def test_our_loss_is_the_models_own(model_type: str) -> None:
    model, inputs = adapted(model_type), batch()
    found = CausalLMLoss(model, chunk_size=5)(Batch.of(inputs["input_ids"], **inputs))
    own = logits(model, **{"tokens" if key == "input_ids" else key: value for key, value in inputs.items()})
    wanted = F.cross_entropy(own[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(found, wanted, rtol=LOSS_TOLERANCE, atol=0)


@decoders
def test_loaded_as_by_hugging_face(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = copy.deepcopy(base_model(model_type))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    found = load_model(str(tmp_path), quantization="none", compute_dtype=torch.bfloat16)
    assert_same(found.state_dict(), expected)
    assert {t.dtype for t in found.state_dict().values()} == {t.dtype for t in expected.values()}
    num_layers = structure_of(found).num_layers
    for stage in (StageLayers(0, 1, num_layers), StageLayers(1, num_layers, num_layers)):
        part = load_model(
            str(tmp_path), quantization="none", compute_dtype=torch.bfloat16, stage=stage
        ).state_dict()
        assert_same(part, {name: expected[name] for name in part})


@decoders
def test_layers_take_and_return_hidden_states(model_type: str) -> None:
    check_layers(empty_model(load_config(config=bare_config(model_type)), dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("model_type", "projections"),
    [("opt", ("fc1", "fc2")), ("qwen2_moe", ("shared_expert.gate_proj", "shared_expert.up_proj"))],
)
def test_state_and_dropout_follow_tokens_that_a_layer_flattens(
    model_type: str, projections: tuple[str, ...]
) -> None:
    model = copy.deepcopy(base_model(model_type))
    add_adapters(model, AdapterConfig(rank=4, alternate=projections, every_layer=["q_proj"], dropout=0.5))
    randomize_adapters(model)
    model.train()
    tokens, seeds = token_ids(3, TOKENS), dropout_seeds(range(3), TOKENS)
    together = logits(model, tokens, dropout_seeds=seeds)
    for row in range(3):
        alone = logits(model, tokens[row : row + 1], dropout_seeds=seeds[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(together, logits(model, tokens, dropout_seeds=seeds + 3), rtol=0.01)


def test_a_layer_that_returns_more_than_hidden_states_is_refused_as_it_runs() -> None:
    """By `add_adapters` alone, which does not try a model's layers."""
    model = copy.deepcopy(base_model("falcon"))
    add_adapters(model, AdapterConfig(alternate=["query_key_value"]))
    with pytest.raises(AdapterError, match=r'DecoderLayer returns a tuple, and not .* such as "lora"'):
        logits(model, token_ids(1, TOKENS))
    remove_adapters(model)
    add_adapters(model, AdapterConfig(method="lora", alternate=[], every_layer=["query_key_value"]))
    assert logits(model, token_ids(1, TOKENS)).isfinite().all()


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_adapted_is_refused_with_the_reason(model_type: str) -> None:
    model = empty_model(load_config(config=bare_config(model_type)), dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=f"{model_type} models cannot be adapted: {REFUSED[model_type]}"):
        check_layers(model)


def test_the_page_of_models_is_fresh() -> None:
    assert len(TESTED) >= 20
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.decoders"
