"""What all generated tasks have in common: lengths, depths, splits, determinism, one right answer."""

from __future__ import annotations

import re

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.prose import sentences

from .generated import DEPTHS, GENERATED, NEEDLE, make, num_tokens

SPLITS = ("train", "validation", "test")
NUM_SAMPLES = 1000
# Of the length; and never above it.
LENGTH_TOLERANCE = 0.01
DEPTH_TOLERANCE = 0.02
LONGEST_WORD = 24

FACTS = re.compile(f"{NEEDLE.pattern}|The pass key is .* mind\\.")
NAME = re.compile(r"[A-Z]{5}|[0-9a-f-]{36}|\d{5,}|[a-z]+-[a-z]+")
PROSE_NAMES = set(NAME.findall(" ".join(sentences())))


def check_answer(name, item):
    task = GENERATED[name]
    found, references = task.solve(item.prompt), list(item.references)
    assert len(set(references)) == len(references)
    assert (found if task.ordered else sorted(found)) == (references if task.ordered else sorted(references))


def check_depth(tokenizer, item):
    """Where the asked fact lies, counted in text before and around it."""
    position = item.prompt.index(item.references[0])
    start, end = (
        item.prompt.rindex("\nText:", 0, position) + len("\nText:"),
        item.prompt.rindex("\nQuestion:"),
    )
    fact = next(match for match in FACTS.finditer(item.prompt) if match.start() <= position < match.end())
    before = num_tokens(tokenizer, item.prompt[start : fact.start()])
    after = num_tokens(tokenizer, item.prompt[fact.end() : end])
    assert abs(before / (before + after) - item.metadata["depth"]) <= DEPTH_TOLERANCE


# Each task at the lengths that hold it.
@pytest.mark.parametrize(
    ("name", "length"),
    [
        pytest.param(name, length, marks=[pytest.mark.slow] if length == 4096 else [])
        for name, task in GENERATED.items()
        for length in (256, 512, 1024, 2048, 4096)
        if length >= task.least
    ],
)
def test_a_thousand_samples(name, length, word_tokenizer):
    """Exact lengths and depths, and one answer in every prompt."""
    lookalikes = "multikey_2" in name or "multikey_3" in name
    for number, item in enumerate(make(name, word_tokenizer, [length], NUM_SAMPLES, split="train")):
        total = num_tokens(word_tokenizer, item.prompt) + item.max_new_tokens
        assert length * (1 - LENGTH_TOLERANCE) <= total <= length, (number, total)
        assert item.metadata["length"] == length
        assert item.prompt == item.prompt.rstrip()
        check_answer(name, item)
        if "depth" in item.metadata:
            assert item.metadata["depth"] == DEPTHS[number % len(DEPTHS)]
            assert item.prompt.count(item.references[0]) == 1
            check_depth(word_tokenizer, item)
        # Every tenth, since these prompts are made of them.
        if lookalikes and number % 10 == 0:
            keys, values = zip(*NEEDLE.findall(item.prompt), strict=True)
            assert len({*keys, *values}) == len(keys) + len(values)


@pytest.mark.parametrize("tokenizer_name", ["byte_tokenizer", "bpe_tokenizer", "sentencepiece_tokenizer"])
@pytest.mark.parametrize("name", GENERATED)
def test_lengths_hold_in_tokens_that_merge(name, tokenizer_name, request):
    tokenizer = request.getfixturevalue(tokenizer_name)
    length = 10000 if name == "common_words" else 2000
    for item in make(name, tokenizer, [length], 5):
        total = num_tokens(tokenizer, item.prompt) + item.max_new_tokens
        assert length * (1 - LENGTH_TOLERANCE) <= total <= length
        check_answer(name, item)
        if "depth" in item.metadata:
            check_depth(tokenizer, item)


@pytest.mark.parametrize("name", GENERATED)
def test_short_prompts_lack_at_most_a_word(name, bpe_tokenizer):
    length = 1000 if "words" in name or "_3" in name else 640
    for item in make(
        name, bpe_tokenizer, [length], 8, **({"num_fewshot": 0} if name == "common_words" else {})
    ):
        total = num_tokens(bpe_tokenizer, item.prompt) + item.max_new_tokens
        assert length - LONGEST_WORD <= total <= length
        check_answer(name, item)


@pytest.mark.parametrize(
    "name", ["passkey", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1"]
)
def test_depths_hold_in_short_texts_of_tokens_that_merge(name, bpe_tokenizer):
    for item in make(name, bpe_tokenizer, [512], 100):
        check_depth(bpe_tokenizer, item)


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_name(name, word_tokenizer):
    """Keys, values, variables and words of all prompts, those not asked for included, under several seeds."""
    owners = {}
    for split in SPLITS:
        for seed in range(2):
            for item in make(name, word_tokenizer, [1024], 20, split=split, seed=seed):
                names = {*NAME.findall(item.prompt), *item.references}
                if name == "common_words":
                    names |= {word for _, word in re.findall(r" (\d+)\. ([a-z-]+)", item.prompt)}
                if name == "frequent_words":
                    names |= set(
                        re.findall(r" ([a-z]{6})(?= )", item.prompt.split("\nText:")[1].split("\n")[0])
                    )
                for one in names - PROSE_NAMES:
                    owners.setdefault(one, set()).add(split)
    shared = {one for one, splits in owners.items() if len(splits) > 1}
    assert not shared
    assert len(owners) > 100


@pytest.mark.parametrize("name", GENERATED)
def test_an_item_depends_on_settings_and_its_number_alone(name, word_tokenizer):
    lengths = [1024, 1500]
    few, many = (list(make(name, word_tokenizer, lengths, count)) for count in (3, 7))
    assert many[:6] == few
    assert [item.metadata["length"] for item in few] == lengths * 3
    assert len({item.id for item in many}) == len({item.prompt for item in many}) == 14
    assert list(make(name, word_tokenizer, lengths, 3)) == few
    alone = {item.id: item for item in make(name, word_tokenizer, [1024], 3)}
    assert [alone.get(item.id) for item in few[::2]] == few[::2]
    for changes in ({"seed": 1}, {"split": "train"}):
        others = make(name, word_tokenizer, lengths, 3, **changes)
        assert all(one.references != other.references for one, other in zip(few, others, strict=True))


@pytest.mark.parametrize("name", GENERATED)
def test_least_length_is_named_and_suffices(name, bpe_tokenizer):
    with pytest.raises(DataError, match=r": a length of 64 tokens cannot hold .* at least \d+$") as error:
        make(name, bpe_tokenizer, [2000, 64], 8)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    items = list(make(name, bpe_tokenizer, [least], 8))
    assert all(num_tokens(bpe_tokenizer, item.prompt) + item.max_new_tokens <= least for item in items)
    for item in items:
        check_answer(name, item)
    with pytest.raises(DataError, match="cannot hold"):
        make(name, bpe_tokenizer, [least - 1], 8)


def test_bad_settings_are_named(word_tokenizer):
    with pytest.raises(DataError, match="passkey: split 'dev' is none of train, validation, test"):
        make("passkey", word_tokenizer, [256], 1, split="dev")
    with pytest.raises(DataError, match=r"passkey: lengths \[256, 256\]"):
        make("passkey", word_tokenizer, [256, 256], 1)
    with pytest.raises(DataError, match="passkey: num_examples 0"):
        make("passkey", word_tokenizer, [256], 0)
