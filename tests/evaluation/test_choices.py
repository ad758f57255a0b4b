"""Log-likelihoods of choices: against plain forward passes, whatever is around an item."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ssmlora_dist.evaluation.choices import choice_log_likelihoods
from ssmlora_dist.evaluation.encoding import EncodedChoices, PromptEncoder
from ssmlora_dist.models.tokenizer import load_tokenizer
from tests.tiny import FAMILY_NAMES, SEED, VOCAB_SIZE, adapted_model, tiny_model

# Sums of a few float32 log-softmax values of order 10, over logits whose sums are taken in another order.
TOLERANCE = 1e-4

families = pytest.mark.parametrize("model_type", FAMILY_NAMES)


def make_items(num_items: int, seed: int = SEED) -> list[EncodedChoices]:
    """Prompts within and beyond the window of 6, items with choices of one token, of several, of both."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    ids = lambda length: [draw.randrange(1, VOCAB_SIZE) for _ in range(length)]  # noqa: E731
    shapes = [(1, 1), (4, 1, 2), (3, 9), (1, 5, 5, 2), (7, 2)]
    return [
        EncodedChoices(ids(draw.choice([1, 3, 5, 6, 7, 12, 20])), tuple(map(ids, shapes[i % len(shapes)])))
        for i in range(num_items)
    ]


def one_by_one(model: Any, items: Sequence[EncodedChoices]) -> list[tuple[float, ...]]:
    """Each choice from a pass of its own over prompt and choice: no cache, no padding, no batch."""
    return [tuple(plain_pass(model, [item.prompt], [ids])[0] for ids in item.choices) for item in items]


@torch.no_grad()
def plain_pass(model: Any, prompts: Sequence[list[int]], choices: Sequence[list[int]]) -> list[float]:
    """One choice of each prompt from one right-padded pass without a cache."""
    rows = [prompt + ids for prompt, ids in zip(prompts, choices, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    found = torch.log_softmax(logits.double(), -1)
    return [
        sum(found[row, len(prompt) + k - 1, token].item() for k, token in enumerate(ids))
        for row, (prompt, ids) in enumerate(zip(prompts, choices, strict=True))
    ]


def largest_error(got: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> float:
    assert [len(values) for values in got] == [len(values) for values in wanted]
    return max(abs(a - b) for g, w in zip(got, wanted, strict=True) for a, b in zip(g, w, strict=True))


def assert_same(got: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]]) -> None:
    error = largest_error(got, wanted)
    assert error <= TOLERANCE, f"log-likelihoods differ by {error:.1e}"
    assert [max(range(len(v)), key=v.__getitem__) for v in got] == [
        max(range(len(v)), key=v.__getitem__) for v in wanted
    ]


@families
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_an_item_alone_in_a_batch_shuffled_and_padded_on_either_side(model_type: str, adapted: bool) -> None:
    model = adapted_model(model_type) if adapted else tiny_model(model_type)
    items = make_items(16)
    wanted = one_by_one(model, items)
    assert_same([choice_log_likelihoods(model, [item])[0] for item in items], wanted)
    assert_same(choice_log_likelihoods(model, items), wanted)
    order = random.Random(1).sample(range(16), 16)
    shuffled = choice_log_likelihoods(model, [items[i] for i in order])
    assert_same(shuffled, [wanted[i] for i in order])
    first_choices = [item.choices[0] for item in items]
    right_padded = plain_pass(model, [item.prompt for item in items], first_choices)
    assert_same([(value,) for value in right_padded], [values[:1] for values in wanted])
    # Numbers that tell items and choices apart: nothing above is equal because everything is.
    assert len({round(value, 3) for values in wanted for value in values}) > 30


@families
def test_eager_attention(model_type: str) -> None:
    model = adapted_model(model_type)
    model.set_attn_implementation("eager")
    items = make_items(6)
    assert_same(choice_log_likelihoods(model, items), one_by_one(model, items))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_backbone_in_4_bits(model_type: str) -> None:
    model = adapted_model(model_type, quantization="nf4")
    items = make_items(6)
    assert_same(choice_log_likelihoods(model, items), one_by_one(model, items))


def test_half_precision_logits_enter_the_softmax_in_float32() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    items = [EncodedChoices([5, 6, 7], ([1], [2], [3, 4]))]
    [found] = choice_log_likelihoods(model, items)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits[0, -1]
    wanted = torch.log_softmax(logits.float(), -1)
    assert found[:2] == (wanted[1].item(), wanted[2].item())


def watch_passes(model: Any) -> list[tuple[int, int]]:
    """Shapes of the ids of every forward pass, in a list that grows."""
    passes: list[tuple[int, int]] = []
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: passes.append(tuple(ids[0].shape)))
    return passes


def test_choices_of_one_token_need_the_prompt_alone() -> None:
    model = tiny_model()
    passes = watch_passes(model)
    choice_log_likelihoods(model, [EncodedChoices([1, 2, 3], ([4], [5], [6]))] * 2)
    assert passes == [(2, 3)]


def test_the_prompt_is_computed_once_and_the_longest_choices_together() -> None:
    model = tiny_model()
    passes = watch_passes(model)
    items = [
        EncodedChoices([1] * 20, ([4], [5, 6, 7], [8, 9, 8, 9, 8])),
        EncodedChoices([2] * 12, ([4, 5], [6] * 6)),
    ]
    choice_log_likelihoods(model, items)
    assert passes == [(2, 20), (2, 5), (2, 2)], "prompts, the longest choices, the second longest"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_the_cache_is_cut_back_behind_every_choice(model_type: str) -> None:
    model = tiny_model(model_type)
    caches: list[Any] = []
    forward = model.forward

    def kept(**inputs: Any) -> Any:
        output = forward(**inputs)
        caches.append((output.past_key_values, output.past_key_values.get_seq_length()))
        return output

    model.forward = kept
    choice_log_likelihoods(model, [EncodedChoices([1] * 10, ([4, 5, 6], [5, 6, 7, 8], [9, 9]))])
    assert [length for _, length in caches] == [10, 13, 12, 11]
    assert len({id(cache) for cache, _ in caches}) == 1
    assert caches[0][0].get_seq_length() == 10
    assert {layer.keys.shape[0] for layer in caches[0][0].layers} == {1}, "never repeated"


def test_an_adapted_model_in_the_standard_harness_has_the_same_log_likelihoods() -> None:
    """The harness takes the model as it is: `HFLM(pretrained=model, tokenizer=tokenizer)`."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = load_tokenizer("bytes")
    model = adapted_model(vocab_size=259)
    questions = [
        ("Is it so?", [" yes", " no"]),
        ("Which of the four is it? ", ["the first", "b", "neither of them", "all"]),
        ("", ["one", "two words"]),
        ("A or B?", ["A", "B"]),
    ]
    asked = [(prompt, choice) for prompt, choices in questions for choice in choices]
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    requests = [type("Request", (), {"args": pair, "task_name": None}) for pair in asked]
    wanted = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    encoder = PromptEncoder(tokenizer, model.config.max_position_embeddings, 259)
    found = choice_log_likelihoods(model, [encoder.choices(*question) for question in questions])
    assert_same([sum(found, ())], [wanted])
