"""What the variants of RULER have of their own."""

from __future__ import annotations

import re

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.tasks.haystack import NOISE
from ssmlora_dist.evaluation.tasks.names import draw_names, owned_pairs
from ssmlora_dist.evaluation.tasks.needles import NEEDLE_VARIANTS, NeedleVariant, needles
from ssmlora_dist.prose import KEYS, sentences

from .generated import NEEDLE, make

WORD, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

LONG_SENTENCES = [sentence for sentence in sentences() if len(sentence) > 60]

# Kinds of keys and values, number of facts (None: as many as there is room for), number of references.
FORMS = {
    "single_1": (WORD, NUMBER, 1, 1),
    "single_2": (WORD, NUMBER, 1, 1),
    "single_3": (WORD, UUID, 1, 1),
    "multikey_1": (WORD, NUMBER, 4, 1),
    "multikey_2": (WORD, NUMBER, None, 1),
    "multikey_3": (UUID, UUID, None, 1),
    "multivalue": (WORD, NUMBER, 4, 4),
    "multiquery": (WORD, NUMBER, 4, 4),
}


@pytest.mark.parametrize("name", NEEDLE_VARIANTS)
def test_kinds_and_numbers(name, word_tokenizer):
    key_kind, value_kind, num_facts, num_references = FORMS[name]
    for item in make(f"niah_{name}", word_tokenizer, [1500], 10):
        facts = NEEDLE.findall(item.prompt)
        assert all(re.fullmatch(key_kind, key) and re.fullmatch(value_kind, value) for key, value in facts)
        assert len(facts) > 15 if num_facts is None else len(facts) == num_facts
        assert len({key for key, _ in facts}) == (1 if name == "multivalue" else len(facts))
        assert len(item.references) == num_references
        assert item.max_new_tokens == 128
        assert ("depth" in item.metadata) == (num_references == 1)
        assert item.prompt.endswith(" is" if num_references == 1 else " are")
        if num_facts is not None:
            assert (NOISE[0] in item.prompt) == (name == "single_1")
            assert any(sentence in item.prompt for sentence in LONG_SENTENCES) == (name != "single_1")


def test_lookalikes_do_not_point_at_the_asked_fact(word_tokenizer):
    """In the middle of a haystack of facts it is facts that stand before and behind it."""
    for item in make("niah_multikey_2", word_tokenizer, [2000], 20):
        if item.metadata["depth"] in (0.25, 0.5):
            lines = item.prompt.split("\n")
            position = next(k for k, line in enumerate(lines) if item.references[0] in line)
            assert NEEDLE.fullmatch(lines[position - 1])
            assert NEEDLE.fullmatch(lines[position + 1])


def test_several_asked_facts_lie_in_any_order(word_tokenizer):
    orders = set()
    for item in make("niah_multiquery", word_tokenizer, [1024], 40):
        values = [value for _, value in NEEDLE.findall(item.prompt)]
        orders.add(tuple(values.index(reference) for reference in item.references))
    assert len(orders) > 10


def test_splits_own_their_pairs():
    pairs = [owned_pairs(split) for split in ("train", "validation", "test")]
    assert sorted(pair.replace("-", " ") for owned in pairs for pair in owned) == sorted(KEYS)


def test_names_in_the_text_to_avoid_are_not_drawn():
    from random import Random

    pairs = owned_pairs("test")
    drawn = draw_names("words", len(pairs) - 1, "test", Random(0), avoid=f"the {pairs[7]} here")
    assert sorted([*drawn, pairs[7]]) == sorted(pairs)
    (number,) = draw_names("numbers", 1, "test", Random(0))
    assert draw_names("numbers", 1, "test", Random(0), avoid=f"{number}.") != [number]


def test_too_few_keys_are_named(word_tokenizer):
    settings = {"lengths": [1024], "depths": [0.5], "num_examples": 1, "split": "test", "seed": 0}
    with pytest.raises(DataError, match=r"3000 keys or values of kind `words` .* test split has \d+"):
        needles(word_tokenizer, NeedleVariant("prose", num_keys=3000), **settings)
    with pytest.raises(DataError, match="num_queries 2 is more than num_keys 1"):
        needles(word_tokenizer, NeedleVariant("prose", num_queries=2), **settings)
    long = settings | {"lengths": [200_000]}
    with pytest.raises(DataError, match="for shorter inputs or for `uuids`"):
        next(needles(word_tokenizer, NEEDLE_VARIANTS["multikey_2"], **long))


def test_text_is_for_variants_with_prose(word_tokenizer):
    settings = {"lengths": [1024], "depths": [0.5], "num_examples": 1, "split": "test", "seed": 0}
    text = "It was late. Nobody spoke. "
    (item,) = needles(word_tokenizer, NEEDLE_VARIANTS["single_2"], **settings, text=text)
    assert "It was late. Nobody spoke. It was late." in item.prompt
    for name in ("single_1", "multikey_2"):
        with pytest.raises(DataError, match="a text is given and this variant hides its facts in"):
            needles(word_tokenizer, NEEDLE_VARIANTS[name], **settings, text=text)
    with pytest.raises(DataError, match="background text is empty"):
        needles(word_tokenizer, NEEDLE_VARIANTS["single_2"], **settings, text=" ")
