"""Greedy answers: against plain forward passes, alone and in a batch, and where they end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ssmlora_dist.evaluation.generation import EncodedPrompt, generate
from ssmlora_dist.models.tokenizer import load_tokenizer
from tests.tiny import FAMILY_NAMES, SEED, adapted_model, tiny_model

VOCAB_SIZE = 259
families = pytest.mark.parametrize("model_type", FAMILY_NAMES)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("bytes")


def make_prompts(num_items: int, max_new_tokens: int = 12) -> list[EncodedPrompt]:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    lengths = [draw.choice([1, 3, 6, 7, 15, 30]) for _ in range(num_items)]
    return [EncodedPrompt([draw.randrange(97, 123) for _ in range(n)], max_new_tokens) for n in lengths]


@torch.no_grad()
def plain_answer(model: Any, item: EncodedPrompt, ends: Sequence[int] = ()) -> list[int]:
    """A pass over everything so far for every token."""
    ids = list(item.prompt)
    for _ in range(item.max_new_tokens):
        token = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        if token in ends:
            break
        ids.append(token)
    return ids[len(item.prompt) :]


@contextmanager
def scripted(model: Any, tokenizer: Any, *answers: str | list[int]) -> Iterator[list[int]]:
    """Has each row's likeliest tokens spell out an answer; yields the rows of every pass, as they come."""
    written = [list(a) if isinstance(a, list) else tokenizer(a)["input_ids"] for a in answers]
    passes: list[int] = []

    def head(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        step = len(passes)
        passes.append(len(logits))
        wanted = torch.tensor([row[min(step, len(row) - 1)] for row in written])
        return torch.nn.functional.one_hot(wanted, VOCAB_SIZE).float()[:, None]

    handle = model.lm_head.register_forward_hook(head)
    yield passes
    handle.remove()


@families
def test_alone_in_a_batch_and_shuffled_the_text_is_the_same(model_type: str, tokenizer: Any) -> None:
    model = adapted_model(model_type, vocab_size=VOCAB_SIZE)
    items = make_prompts(8)
    ends = [tokenizer.eos_token_id]
    answers = [plain_answer(model, item, ends) for item in items]
    wanted = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    assert [generate(model, tokenizer, [item])[0] for item in items] == wanted
    assert generate(model, tokenizer, items) == wanted
    order = random.Random(1).sample(range(8), 8)
    assert generate(model, tokenizer, [items[i] for i in order]) == [wanted[i] for i in order]
    assert len(set(wanted)) > 4


def test_the_prompt_is_computed_once(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    passes: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: passes.append(ids[0].shape[1]))
    with scripted(model, tokenizer, "abcdefgh"):
        generate(model, tokenizer, [EncodedPrompt([97] * 9, 5)])
    assert passes == [9, 1, 1, 1, 1]


def test_a_text_is_cut_before_its_first_stop_text(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    items = [EncodedPrompt([97], 20, ("\n\n", "END")), EncodedPrompt([97, 98], 20, ("x",))]
    with scripted(model, tokenizer, "one\ntwo EN END\n\nmore", "abcdefghijklmnopqrstuvwxyz") as passes:
        assert generate(model, tokenizer, items) == ["one\ntwo EN ", "abcdefghijklmnopqrst"]
    assert len(passes) == 20
    with scripted(model, tokenizer, "one\n\ntwo", "abxdef") as passes:
        assert generate(model, tokenizer, items) == ["one", "ab"]
    assert len(passes) == 5, "it goes on although every row is done"
    # A stop text that the last token allowed completes is cut too, and one that it does not complete is not.
    with scripted(model, tokenizer, "abEND"):
        assert generate(model, tokenizer, [EncodedPrompt([97], 5, ("END",))]) == ["ab"]
    with scripted(model, tokenizer, "abEND"):
        assert generate(model, tokenizer, [EncodedPrompt([97], 4, ("END",))]) == ["abEN"]


def test_rows_end_each_at_its_own_number_of_tokens(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    items = [EncodedPrompt([97], 2), EncodedPrompt([97], 6), EncodedPrompt([97], 1)]
    with scripted(model, tokenizer, *["abcdefgh"] * 3) as passes:
        assert generate(model, tokenizer, items) == ["ab", "abcdef", "a"]
    assert len(passes) == 6


def test_every_end_of_sequence_token_ends_a_row(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    model.generation_config.eos_token_id = [7, 8]
    items = [EncodedPrompt([97], 9)] * 3
    answers = [[97, 98, 7, 97], [97, tokenizer.eos_token_id, 97], [97, 98, 99, 8]]
    with scripted(model, tokenizer, *answers) as passes:
        assert generate(model, tokenizer, items) == ["ab", "a", "abc"]
    assert len(passes) == 4


@pytest.mark.parametrize("stop_strings", ["END", ["END", "x"]])
def test_stop_texts_of_the_model_end_a_row_too(tokenizer: Any, stop_strings: str | list[str]) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    model.generation_config.stop_strings = stop_strings
    items = [EncodedPrompt([97], 9), EncodedPrompt([97], 9, ("c",))]
    with scripted(model, tokenizer, "abENDcde", "abcdENDe") as passes:
        assert generate(model, tokenizer, items) == ["ab", "ab"]
    assert len(passes) == 5


def test_other_settings_of_the_model_do_not_apply(tokenizer: Any) -> None:
    model = adapted_model(vocab_size=VOCAB_SIZE)
    wanted = generate(model, tokenizer, make_prompts(3))
    model.generation_config.update(repetition_penalty=9.0, num_beams=3, do_sample=True, temperature=5.0)
    assert generate(model, tokenizer, make_prompts(3)) == wanted


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    with scripted(model, tokenizer, [97, tokenizer.bos_token_id, 98, tokenizer.eos_token_id]):
        assert generate(model, tokenizer, [EncodedPrompt([97], 9)]) == ["ab"]


def test_logits_that_are_no_numbers_give_no_text(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    spoiled = lambda _, __, logits: logits.index_fill(0, torch.tensor([1]), torch.nan)  # noqa: E731
    items = make_prompts(3)
    wanted = generate(model, tokenizer, items)
    handle = model.lm_head.register_forward_hook(spoiled)
    assert generate(model, tokenizer, items) == [wanted[0], None, wanted[2]]
    handle.remove()


def test_texts_are_those_of_the_standard_harness(tokenizer: Any) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    model = adapted_model(vocab_size=VOCAB_SIZE, max_position_embeddings=512)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    prompts = [tokenizer.decode(item.prompt) for item in make_prompts(6)]
    asked = [
        type("Request", (), {"args": (prompt, {"until": ["e"], "max_gen_toks": 12, "do_sample": False})})
        for prompt in prompts
    ]
    wanted = harness.generate_until(asked, disable_tqdm=True)
    items = [EncodedPrompt(item.prompt, 12, ("e",)) for item in make_prompts(6)]
    assert generate(model, tokenizer, items) == wanted
