"""Invariants of DESIGN section 3 in one process: I1, I4, I5, I9; evaluation between training steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.batches import IGNORED_LABEL, Batch
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from tests.tiny import FAMILY_NAMES, QV_AND_MLP, adapted_model, tiny_model, token_ids

# Float32 logits of order 3: the same sums, over keys or over rows of a product, taken in another order.
LOGITS_TOLERANCE = 1e-5
# The same for gradients, relative to the largest of them.
GRADIENT_TOLERANCE = 1e-5
PAD = 0

families = pytest.mark.parametrize("model_type", FAMILY_NAMES)


def positions(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """One batch of rows of different lengths."""
    length = max(len(row) for row in rows)
    blanks = [row.new_full((length - len(row),), PAD) for row in rows]
    pairs = zip(blanks, rows, strict=True)
    input_ids = torch.stack([torch.cat([b, r] if side == "left" else [r, b]) for b, r in pairs])
    attention_mask = (input_ids != PAD).long()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": positions(attention_mask),
    }


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


@families
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_i1_a_freshly_adapted_model_is_the_base_model(
    model_type: str, quantization: str, dtype: torch.dtype, training: bool
) -> None:
    everywhere = AdapterConfig(
        rank=4, every_layer=("k_proj", "up_proj"), every_layer_method="ssmlora", dropout=0.2
    )
    tokens = token_ids(2, 9)
    settings: dict[str, Any] = {"quantization": quantization, "dtype": dtype}
    expected = logits(tiny_model(model_type, **settings), input_ids=tokens)
    for config in (QV_AND_MLP, everywhere):
        model = add_adapters(tiny_model(model_type, **settings), config).train(training)
        assert torch.equal(logits(model, input_ids=tokens), expected)


@families
@pytest.mark.parametrize("around", ["batch", "right", "left"])
def test_i4_the_logits_of_a_sample_do_not_depend_on_what_is_around_it(model_type: str, around: str) -> None:
    model = adapted_model(model_type)
    lengths = [9, 9, 9] if around == "batch" else [11, 7, 9]
    rows = [token_ids(1, length, seed=length + i)[0] for i, length in enumerate(lengths)]
    together = logits(model, **padded(rows, side=around))
    for row, got in zip(rows, together, strict=True):
        alone = logits(model, input_ids=row[None])[0]
        own = got[-len(row) :] if around == "left" else got[: len(row)]
        error = (own - alone).abs().max().item()
        assert error <= LOGITS_TOLERANCE, f"{len(row)} tokens: {error:.1e}"


def full_passes(
    model: Any, input_ids: Tensor, attention_mask: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B,T] and their logits [B,T,V], from a forward pass over the whole input for each."""
    steps = []
    for _ in range(num_tokens):
        last = logits(
            model, input_ids=input_ids, attention_mask=attention_mask, position_ids=positions(attention_mask)
        )[:, -1]
        steps.append(last)
        input_ids = torch.cat([input_ids, last.argmax(-1, keepdim=True)], 1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(attention_mask), 1)], 1)
    return input_ids[:, -num_tokens:], torch.stack(steps, 1)


@families
@pytest.mark.parametrize("lengths", [[7], [5, 8, 3]], ids=["alone", "left_padded"])
def test_i5_cached_generation_is_a_full_pass_for_every_token(model_type: str, lengths: list[int]) -> None:
    model = adapted_model(model_type)
    num_tokens = 8
    inputs = padded([token_ids(1, length, seed=length)[0] for length in lengths], side="left")
    del inputs["position_ids"]
    passes: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, ids, __: passes.append(ids[0].shape[1]))
    generated = model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    hook.remove()
    assert passes == [max(lengths)] + [1] * (num_tokens - 1), "the cache was not used"
    tokens, expected = full_passes(model, **inputs, num_tokens=num_tokens)
    assert torch.equal(generated.sequences[:, -num_tokens:], tokens)
    error = (torch.stack(generated.logits, 1) - expected).abs().max().item()
    assert error <= LOGITS_TOLERANCE, f"logits differ by {error:.1e}"


def gradients_of_micro_batches(
    micro_batches: list[list[Tensor]], prompts: dict[int, int]
) -> dict[str, Tensor]:
    """Gradient of the mean over all target tokens; `prompts` gives the prompt's length by the row's."""
    model = adapted_model().train()
    module = CausalLMLoss(model, chunk_size=4)
    num_targets = sum(len(row) - prompts[len(row)] for rows in micro_batches for row in rows)
    for rows in micro_batches:
        inputs = padded(rows, "right")
        mask = inputs.pop("attention_mask")
        labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED_LABEL)
        for row, label in zip(rows, labels, strict=True):
            label[: prompts[len(row)]] = IGNORED_LABEL
        (module(Batch.of(labels, **inputs)) / num_targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def largest_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert got.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    return max(((got[name] - wanted[name]).abs().max() / largest).item() for name in wanted)


def test_i9_micro_batches_of_1_and_of_4_give_the_same_gradient() -> None:
    prompts = {11: 2, 7: 6, 9: 1, 5: 3}  # 9, 1, 8 and 2 target tokens
    rows = [token_ids(1, length, seed=length)[0] for length in prompts]
    one_by_one = gradients_of_micro_batches([[row] for row in rows], prompts)
    at_once = gradients_of_micro_batches([rows], prompts)
    two_by_two = gradients_of_micro_batches([rows[:2], rows[2:]], prompts)
    for got in (at_once, two_by_two):
        error = largest_error(got, one_by_one)
        assert error <= GRADIENT_TOLERANCE, f"relative error {error:.1e}"
    # A mean of the rows' means, the usual mistake, is another gradient altogether.
    means = [gradients_of_micro_batches([[row]], prompts) for row in rows]
    of_means = {name: torch.stack([mean[name] for mean in means]).mean(0) for name in one_by_one}
    assert largest_error(of_means, one_by_one) > 0.1


def score(model: Any, no_gradients: Callable[[], Any]) -> None:
    tokens = token_ids(3, 8, seed=2)
    with no_gradients():
        CausalLMLoss(model.eval(), 4)(
            Batch.of(tokens, scored=torch.ones_like(tokens, dtype=torch.bool), input_ids=tokens)
        )


EVALUATIONS: dict[str, Callable[[Any], None]] = {
    "scores": lambda model: score(model, contextlib.nullcontext),
    "no_grad": lambda model: score(model, torch.no_grad),
    "inference_mode": lambda model: score(model, torch.inference_mode),
    "generate": lambda model: model.eval().generate(
        token_ids(2, 5, seed=3), max_new_tokens=4, do_sample=False
    ),
}


def gradients_of_the_second_step(
    quantization: str, evaluate: Callable[[Any], None] | None
) -> dict[str, Tensor]:
    model = adapted_model(quantization=quantization, dtype=torch.bfloat16)
    checkpoint_layers(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(2):
        tokens = token_ids(2, 9, seed=step)
        optimizer.zero_grad()
        CausalLMLoss(model.train(), chunk_size=4)(Batch.of(tokens, input_ids=tokens)).backward()
        if step == 0:
            optimizer.step()
            if evaluate:
                evaluate(model)
    return {name: p.grad for name, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_evaluation_between_training_steps_changes_no_gradient(
    quantization: str, evaluate: Callable[[Any], None]
) -> None:
    expected = gradients_of_the_second_step(quantization, evaluate=None)
    gradients = gradients_of_the_second_step(quantization, evaluate)
    assert gradients.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(gradients[name], expected[name])] == []
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if "lora_" in name)
