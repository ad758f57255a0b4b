"""How often words occur in the lists of common and of frequent words."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ssmlora_dist.errors import DataError

from .generated import make, num_tokens

ENTRY = re.compile(r" \d+\. ([a-z-]+)")


def occurrences(text):
    """How many words of a numbered list occur how often."""
    return Counter(Counter(ENTRY.findall(text)).values())


@pytest.mark.parametrize(
    ("length", "common", "uncommon", "solved"),
    [(1500, 6, 1, {3: 10, 1: 10}), (8000, 30, 3, {10: 10, 3: 30})],
)
def test_repeats_of_common_words(length, common, uncommon, solved, word_tokenizer):
    for item in make("common_words", word_tokenizer, [length], 10):
        example, problem = item.prompt.split("\n\n")
        assert set(occurrences(problem)) == {common, uncommon}
        assert occurrences(problem)[common] == 10
        text, answer = example.split("\nQuestion")
        assert occurrences(text) == solved
        best = [word for word, _ in Counter(ENTRY.findall(text)).most_common(10)]
        assert sorted(ENTRY.findall(answer)) == sorted(best)
        assert not {*ENTRY.findall(text)} & {*ENTRY.findall(problem)}
        assert item.max_new_tokens == 120


def test_no_common_word_is_part_of_another(word_tokenizer):
    for item in make("common_words", word_tokenizer, [2000], 30, split="train"):
        words = set(ENTRY.findall(item.prompt.split("\n\n")[1]))
        parts = [(one, word) for one in item.references for word in words if one != word and one in word]
        assert not parts


def test_long_lists_are_of_pairs_and_have_an_end(word_tokenizer):
    (item,) = make("common_words", word_tokenizer, [30_000], 1)
    assert all("-" in word for word in ENTRY.findall(item.prompt))
    assert 0.99 * 30_000 <= num_tokens(word_tokenizer, item.prompt) + 120 <= 30_000
    with pytest.raises(DataError, match="the test split has too few words for a length of 100000 tokens"):
        make("common_words", word_tokenizer, [1024, 100_000], 1)


def test_few_solved_lists(word_tokenizer):
    (item,) = make("common_words", word_tokenizer, [1024], 1, num_fewshot=0)
    assert item.prompt.count("\nQuestion: ") == 1


@pytest.mark.parametrize("length", [512, 1024, 4096])
def test_frequencies_fall_with_the_square_of_the_rank(length, word_tokenizer):
    for item in make("frequent_words", word_tokenizer, [length], 10):
        words = item.prompt.split("\nText:")[1].split("\nQuestion")[0].split()
        counts = Counter(words)
        dots = counts.pop("...")
        assert item.max_new_tokens == 50
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts)
        first, second, third = (counts[word] for word in item.references)
        # Of dots there may be some more, to fill the prompt.
        assert dots // 4 - 3 <= first <= dots // 4
        assert abs(second - 4 * first / 9) <= 1
        assert abs(third - 4 * first / 16) <= 1
        assert max(counts[word] for word in counts if word not in item.references) < third


def test_vocabulary_grows_with_the_length(word_tokenizer):
    sizes = [
        len(set(item.prompt.split("\nText:")[1].split("\nQuestion")[0].split()))
        for item in make("frequent_words", word_tokenizer, [512, 2048, 16384], 1)
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    # Dots, and a word for every 50 tokens, some of them too rare to occur.
    assert sizes[0] <= (512 - 50) // 50
