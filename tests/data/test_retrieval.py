"""The generated task: lengths, depths, disjoint splits, determinism."""

from __future__ import annotations

import re

import pytest

from ssmlora_dist.data.examples import IGNORE_INDEX
from ssmlora_dist.data.retrieval import generate_retrieval
from ssmlora_dist.errors import DataError
from ssmlora_dist.prose import KEYS, split_of
from ssmlora_dist.tokenization import TextEncoder

SPLITS = ("train", "validation", "test")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# The fact is placed to the token; rounding half a token is all that can be off.
DEPTH_TOLERANCE = 0.02

FACT_PATTERN = re.compile(r"The access code for ([a-z]+ [a-z]+) is (\d+)\.")


def generate(tokenizer, split="train", **changes):
    settings = {
        "lengths": (512,),
        "depths": DEPTHS,
        "num_lookalikes": 4,
        "num_digits": 5,
        "num_examples": 10,
        "seed": 0,
    }
    return generate_retrieval(tokenizer, split, **{**settings, **changes})


def same(one, other):
    return (
        one.input_ids.tolist() == other.input_ids.tolist()
        and one.labels.tolist() == other.labels.tolist()
        and one.metadata == other.metadata
    )


@pytest.fixture(params=["byte_tokenizer", "bpe_tokenizer", "sentencepiece_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_lengths_are_exact_and_cycle_with_depths(tokenizer):
    examples = generate(tokenizer, lengths=(512, 768, 1024), depths=(0.0, 0.5), num_examples=13)
    assert [example.num_tokens for example in examples] == [e.metadata["length"] for e in examples]
    settings = [(example.metadata["length"], example.metadata["depth"]) for example in examples[:6]]
    assert settings == [(512, 0.0), (512, 0.5), (768, 0.0), (768, 0.5), (1024, 0.0), (1024, 0.5)]
    assert settings[0] == (examples[6].metadata["length"], examples[6].metadata["depth"])


def test_target_is_the_value_and_the_end(tokenizer):
    for example in generate(tokenizer):
        targets = example.labels[example.labels != IGNORE_INDEX].tolist()
        answer = TextEncoder(tokenizer).encode_continuation(f" {example.metadata['value']}")
        assert targets == [*answer, tokenizer.eos_token_id]
        assert example.input_ids[-len(targets) :].tolist() == targets
        assert example.num_scored == len(answer)
        text = tokenizer.decode(example.input_ids[: -len(targets)], skip_special_tokens=True)
        assert text.endswith(f"\nWhat is the access code for {example.metadata['key']}?\nAnswer:")


def test_one_fact_answers_among_lookalikes(tokenizer):
    for example in generate(tokenizer):
        facts = FACT_PATTERN.findall(tokenizer.decode(example.input_ids))
        assert len(facts) == 5
        assert len({key for key, _ in facts}) == len({value for _, value in facts}) == 5
        assert dict(facts)[example.metadata["key"]] == example.metadata["value"]
        assert all(len(value) == 5 for _, value in facts)


def test_fact_lies_at_its_depth(tokenizer):
    encoder = TextEncoder(tokenizer)
    for example in generate(tokenizer, lengths=(512, 1024), num_examples=40):
        key, value = example.metadata["key"], example.metadata["value"]
        fact = encoder.encode_continuation(f" The access code for {key} is {value}.")
        question = encoder.encode_continuation(f"\nWhat is the access code for {key}?\nAnswer:")
        ids = example.input_ids.tolist()
        start = next(k for k in range(len(ids)) if ids[k : k + len(fact)] == fact) - len(encoder.bos_ids)
        around = example.num_tokens - len(encoder.bos_ids) - len(fact) - len(question) - example.num_targets
        assert abs(start / around - example.metadata["depth"]) <= DEPTH_TOLERANCE


def test_lookalikes_lie_on_both_sides(byte_tokenizer):
    """In the middle of the text a fact must not be recognisable as the first or the last of its form."""
    examples = generate(byte_tokenizer, lengths=(1024,), depths=(0.5,), num_examples=20)
    positions = [
        [key for key, _ in FACT_PATTERN.findall(byte_tokenizer.decode(example.input_ids))].index(
            example.metadata["key"]
        )
        for example in examples
    ]
    assert len(set(positions)) >= 3


def test_passages_differ(byte_tokenizer):
    examples = generate(byte_tokenizer, depths=(0.5,), num_examples=20)
    assert len({byte_tokenizer.decode(example.input_ids[:64]) for example in examples}) == 20


def test_splits_share_no_key_and_no_value(byte_tokenizer):
    """Of everything that occurs, look-alikes included, and whatever the seed."""
    keys, values = {}, {}
    for split in SPLITS:
        for seed in (0, 1):
            for example in generate(byte_tokenizer, split, num_examples=60, num_digits=3, seed=seed):
                for key, value in FACT_PATTERN.findall(byte_tokenizer.decode(example.input_ids)):
                    keys.setdefault(key, set()).add(split)
                    values.setdefault(value, set()).add(split)
    assert all(len(owners) == 1 for owners in [*keys.values(), *values.values()])
    assert len(values) > 500
    assert {split_of(key) for key in KEYS} == set(SPLITS)


def test_an_example_depends_on_seed_split_and_index_alone(byte_tokenizer):
    few, many = generate(byte_tokenizer, num_examples=3), generate(byte_tokenizer, num_examples=9)
    assert all(same(one, other) for one, other in zip(few, many, strict=False))
    assert not same(few[0], generate(byte_tokenizer, num_examples=1, seed=1)[0])
    assert not same(few[0], generate(byte_tokenizer, "test", num_examples=1)[0])
    assert len({example.metadata["key"] for example in many}) > 1


def test_least_length_is_named_and_suffices(tokenizer):
    with pytest.raises(DataError, match=r"retrieval\.lengths: 64 tokens cannot hold 3 facts") as error:
        generate(tokenizer, lengths=(512, 64), num_lookalikes=2, num_examples=40)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    examples = generate(tokenizer, lengths=(least,), num_lookalikes=2, num_examples=40)
    assert {example.num_tokens for example in examples} == {least}
    with pytest.raises(DataError, match="cannot hold"):
        generate(tokenizer, lengths=(least - 1,), num_lookalikes=2, num_examples=40)


def test_small_lengths_of_bytes(byte_tokenizer):
    assert generate(byte_tokenizer, lengths=(128,), num_lookalikes=0, num_digits=2)[0].num_tokens == 128
    assert generate(byte_tokenizer, lengths=(256,), num_lookalikes=2, num_digits=3)[0].num_tokens == 256


def test_text_repeats_where_it_is_longer_than_the_corpus(byte_tokenizer):
    (example,) = generate(byte_tokenizer, lengths=(600_000,), num_examples=1)
    assert example.num_tokens == 600_000


def test_too_few_values_or_keys(byte_tokenizer):
    with pytest.raises(DataError, match=r"retrieval\.num_digits: 2 gives test only \d+ values"):
        generate(byte_tokenizer, "test", num_digits=2, num_lookalikes=40, lengths=(4096,))
    with pytest.raises(DataError, match=r"retrieval\.num_lookalikes: 9000 is more than the keys"):
        generate(byte_tokenizer, num_lookalikes=9000)
