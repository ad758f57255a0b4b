"""Tasks of evaluation as training data: the same prompts, answers that score, splits that share nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.schema import TaskSection
from ssmlora_dist.config.tasks import GENERATED, build_task, task_rows
from ssmlora_dist.data import Dataset, Partition, RowReader
from ssmlora_dist.evaluation.encoding import PromptEncoder
from ssmlora_dist.evaluation.items import GenerationAnswer
from ssmlora_dist.long_texts import PIECE
from ssmlora_dist.models.tokenizer import load_tokenizer

from ..evaluation.tasks.generated import write_stories
from ..examples import read_dataset

SEED, NUM_EXAMPLES = 3, 2
# Lengths that hold them in the tokens of both tokenizers.
LENGTHS = {"common_words": 2048, "variable_tracking": 1024}
BABILONG = "babilong_qa1"
KINDS = [*(name for name in GENERATED if not name.startswith("babilong")), BABILONG]


@pytest.fixture(params=["byte_tokenizer", "bpe_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def section(name: str, directory: Path, **settings: Any) -> TaskSection:
    given: dict[str, Any] = {"task": name, "lengths": [LENGTHS.get(name, 768)], "num_examples": NUM_EXAMPLES}
    if name == BABILONG:
        given["path"] = str(write_stories(directory / "qa.txt", 20))
    return TaskSection.model_validate(given | settings)


def dataset(asked: TaskSection, tokenizer: Any, partition: Partition, max_length: int = 10_000) -> Dataset:
    def rows() -> Any:
        return task_rows(asked, tokenizer, SEED, partition)

    return read_dataset(
        RowReader("task", rows, tokenizer=tokenizer, max_length=max_length, too_long="refuse")
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_asked_what_it_was_trained_on(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Of one split both ways give the same token ids, and what is trained is an answer of full score."""
    asked = section(name, tmp_path)
    task, trained = build_task(asked, tokenizer, SEED), dataset(asked, tokenizer, "test")
    encoder = PromptEncoder(tokenizer, None, len(tokenizer))
    items: list[Any] = list(task.items())
    assert len(trained) == len(items) == NUM_EXAMPLES
    for example, item in zip(trained.examples, items, strict=True):
        *answer, end = example.labels[example.num_tokens - example.num_targets :].tolist()
        prompt = encoder.prompt(item.prompt, item.max_new_tokens)
        assert example.input_ids.tolist() == [*prompt, *answer, end]
        assert (example.num_targets, example.num_scored) == (len(answer) + 1, len(answer))
        assert end == tokenizer.eos_token_id
        text = tokenizer.decode(answer)
        assert text == item.answer
        assert text.startswith(" ")
        assert set(task.score(item, GenerationAnswer(text)).values()) == {1.0}
        assert dict(example.metadata) == dict(item.metadata)


def test_a_prompt_that_is_encoded_piece_by_piece_has_the_same_tokens(
    bpe_tokenizer: Any, tmp_path: Path
) -> None:
    asked = section("niah_single_2", tmp_path, lengths=[PIECE // 2], num_examples=1)
    [item] = build_task(asked, bpe_tokenizer, SEED).items()
    assert not hasattr(item, "error")
    assert len(item.prompt) > PIECE
    [example] = dataset(asked, bpe_tokenizer, "test", PIECE).examples
    prompt = PromptEncoder(bpe_tokenizer, None, len(bpe_tokenizer)).prompt(item.prompt, 1)
    assert example.input_ids[: len(prompt)].tolist() == prompt


DRAWN = {
    "passkey": r"\d{5}",
    "niah_multikey_2": r"\d{7}|[a-z]+-[a-z]+",
    "variable_tracking": r"\d{5}|[A-Z]{5}",
    "frequent_words": r"\b[a-z]{6}\b",
}


@pytest.mark.parametrize("name", DRAWN)
def test_splits_share_no_key_value_or_word(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    asked = section(name, tmp_path, num_examples=6, lengths=[1024])

    def drawn(split: Partition) -> set[str]:
        rows = [
            [segment.text for segment in row.segments] for row in task_rows(asked, tokenizer, SEED, split)
        ]
        # Of made-up words the answer: words of the question look alike.
        texts = [answer if name == "frequent_words" else prompt + answer for prompt, answer in rows]
        return {found for text in texts for found in re.findall(DRAWN[name], text)}

    train, validation, test = drawn("train"), drawn("validation"), drawn("test")
    assert min(len(train), len(validation), len(test)) >= 6
    assert not train & validation
    assert not test & (train | validation)


def test_several_values_are_answered_as_they_can_be_known(tmp_path: Path) -> None:
    """Key by key as asked, and the values of one key in the order of the text."""
    tokenizer = load_tokenizer("bytes")
    fact = re.compile(r"A secret number of (\S+) is (\d+)\.")
    for name in ("niah_multivalue", "niah_multiquery"):
        for row in task_rows(section(name, tmp_path, lengths=[1024]), tokenizer, SEED, "train"):
            prompt, answer = (segment.text for segment in row.segments)
            keys = re.findall(r"[a-z]+-[a-z]+", prompt.rpartition("Answer:")[2])
            told = fact.findall(prompt)
            expected = [value for asked in keys for key, value in told if key == asked]
            assert re.findall(r"\d+", answer) == expected
            assert answer == f" {', '.join(expected[:-1])} and {expected[-1]}"


def test_a_task_s_own_seed_comes_before_the_run_s(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")

    def prompts(of_run: int, **settings: Any) -> list[str]:
        rows = task_rows(section("passkey", tmp_path, **settings), tokenizer, of_run, "train")
        return [row.segments[0].text for row in rows]

    assert prompts(0) != prompts(1)
    assert prompts(0, seed=5) == prompts(1, seed=5) == prompts(5)
