"""What generated tasks are made of."""

from __future__ import annotations

from ssmlora_dist.prose import KEYS, QUALITIES, SPLITS, THINGS, sentences, split_of, words


def test_keys_are_distinct():
    assert len(set(QUALITIES)) == len(QUALITIES)
    assert len(set(THINGS)) == len(THINGS)
    assert len(KEYS) == len(set(KEYS)) == len(QUALITIES) * len(THINGS)


def test_splits_own_their_share_for_good():
    """Adapters have been trained on the first split's keys: who owns what must never change."""
    owned = [split_of(key) for key in KEYS]
    shares = [round(owned.count(split) / len(KEYS), 2) for split in SPLITS]
    assert shares == [0.6, 0.2, 0.2]
    assert [split_of(name) for name in ("10000", "10001", "10013")] == ["train", "validation", "test"]


def test_sentences_are_prose():
    assert len(sentences()) > 1000
    assert all(sentence == " ".join(sentence.split()) and sentence for sentence in sentences())
    assert sum(map(len, sentences())) > 200_000


def test_words_are_plain():
    assert len(words()) > 1000
    assert all(word.isascii() and word.islower() and word.isalpha() for word in words())
    assert list(words()) == sorted(set(words()))
