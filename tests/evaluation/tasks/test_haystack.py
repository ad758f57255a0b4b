"""Passages cut to measure, facts in them, haystacks of look-alikes."""

from __future__ import annotations

from random import Random

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.tasks.haystack import NOISE, Background, Lookalikes, background, deal, noise
from ssmlora_dist.evaluation.tasks.lengths import TokenCounter, fit

SENTENCES = ("One two three.", "Four five six seven.", "Eight nine.")
WORDS = " ".join(SENTENCES).split()


class Words:
    """A token a word."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * len(text.split())}


@pytest.fixture
def counter():
    # A word behind the anchor is no word of its own, as long as it does not begin with a space.
    return TokenCounter(Words())


def circle(num_words, start):
    return [WORDS[(start + k) % len(WORDS)] for k in range(num_words)]


@pytest.mark.parametrize("room", [0, 1, 5, 9, 10, 31])
def test_a_passage_has_exactly_its_words_in_order(counter, room):
    haystack = Background(counter, SENTENCES, " ")
    for seed in range(20):
        words = haystack.text_of(room, Random(seed)).split()
        assert len(words) == room
        assert not words or words == circle(room, WORDS.index(words[0]))
        assert not words or words[0] in ("One", "Four", "Eight")


@pytest.mark.parametrize("room_before", [0, 3, 12])
def test_a_fact_lies_between_sentences_at_its_depth(counter, room_before):
    haystack = Background(counter, SENTENCES, " ")
    for seed in range(20):
        words = haystack.hide(["FACT"], room_before / 20, 20, Random(seed)).split()
        position = words.index("FACT")
        assert (position, len(words)) == (room_before, 21)
        rest = words[:position] + words[position + 1 :]
        assert rest == circle(20, WORDS.index(rest[0]))
        assert rest[position] in ("One", "Four", "Eight")


def test_facts_without_a_depth_keep_their_order_between_sentences(counter):
    haystack = Background(counter, SENTENCES, " ")
    positions = set()
    for seed in range(40):
        words = haystack.hide(["A.", "B.", "C."], None, 30, Random(seed)).split()
        facts = [k for k, word in enumerate(words) if word in ("A.", "B.", "C.")]
        assert [words[k] for k in facts] == ["A.", "B.", "C."]
        assert all(k == 0 or words[k - 1].endswith(".") for k in facts)
        assert len(words) == 33
        positions.update(facts)
    assert len(positions) > 15


def test_lines_stay_lines(counter):
    text = noise(counter).hide(["FACT."], 0.5, 60, Random(0))
    assert "\nFACT.\n" in text
    assert set(text.replace("\nFACT.", "").split("\n")[2:-1]) == set(NOISE)


def test_background_is_any_text(counter):
    assert background(counter, "Мама мыла раму.\n\nПапа спал.").text_of(5, Random(0)).split() in (
        "Мама мыла раму. Папа спал.".split(),
        "Папа спал. Мама мыла раму.".split(),
    )
    assert len(background(counter, "no sentence here").text_of(7, Random(0)).split()) == 7
    for text in ("", " \n\t"):
        with pytest.raises(DataError, match="background text is empty"):
            background(counter, text)


def test_text_without_spaces_is_cut(byte_tokenizer):
    counter = TokenCounter(byte_tokenizer)
    text = background(counter, "一二三四五六七八九十" * 40 + "。" + "天地玄黃" * 50).text_of(400, Random(0))
    assert 400 - 3 * 24 < counter.count(text) <= 400


def test_lookalikes_leave_no_more_than_a_fact_to_noise(counter):
    def draw(count, rng, avoid):
        assert avoid in ("", "asked 0")
        return [f"fact number {rng.randrange(100)}" for _ in range(count)]

    haystack = Lookalikes(counter, draw)
    for depth in (0.0, 0.3, 0.5, 1.0):
        text = haystack.hide(["asked 0"], depth, 100, Random(0))
        before, after = text.split("asked 0")
        assert abs(len(before.split()) - 100 * depth) < 1
        assert len(before.split()) + len(after.split()) == 100
        assert before.count("fact") == int(100 * depth) // 3
        assert "fact" not in before[: before.find("fact")]
        assert after.count("fact") == round(100 * (1 - depth)) // 3


def test_facts_are_dealt_to_both_sides_and_never_crowd_one():
    for seed in range(200):
        rng = Random(seed)
        costs = [rng.randrange(1, 9) for _ in range(4)]
        depth, room = rng.random(), rng.randrange(9, 40)
        before, after, left = deal("abcd", costs, depth, room, rng)
        assert sorted(before + after) == list("abcd")
        used = sum(costs["abcd".index(fact)] for fact in before)
        assert used + left == round(depth * (room + sum(costs)))
        assert 0 <= left <= room


class Miscounting(TokenCounter):
    """Says that every prompt is longer than its words."""

    def __init__(self, surplus):
        self.surplus = surplus

    def count(self, prompt):
        return len(prompt.split()) + self.surplus


@pytest.mark.parametrize("surplus", [-30, -1, 0, 1, 30])
def test_prompts_are_made_again_until_they_fit(surplus):
    rooms = []

    def build(room):
        rooms.append(room)
        return "word " * room

    prompt = fit(Miscounting(surplus), 200, 10, build)
    assert len(prompt.split()) + surplus in ((199, 200) if surplus == -1 else (200,))
    assert len(rooms) <= 3


def test_coarse_filler_comes_as_near_as_it_can():
    prompt = fit(Miscounting(0), 100, 0, lambda room: "seven words of which none is missing " * (room // 7))
    assert len(prompt.split()) == 98


def test_what_cannot_fit_is_an_error():
    with pytest.raises(DataError, match="no prompt of at most 5 tokens"):
        fit(Miscounting(0), 5, 3, lambda room: "much too long for such a budget")
