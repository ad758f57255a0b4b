"""Chains of assignments, and the solved example before them."""

from __future__ import annotations

import re

import pytest

from .generated import make, solve_variables

ASSIGNMENT = re.compile(r"Let [A-Z]{5} = (?:[A-Z]{5}|\d{5})\.")


@pytest.mark.parametrize(("num_chains", "num_hops"), [(1, 4), (1, 1), (3, 2)])
def test_chains(num_chains, num_hops, word_tokenizer):
    for item in make(
        "variable_tracking", word_tokenizer, [1024], 30, num_chains=num_chains, num_hops=num_hops
    ):
        problem = item.prompt.split("\n\n")[-1]
        assert len(ASSIGNMENT.findall(problem)) == num_chains * (num_hops + 1)
        assert len(item.references) == num_hops + 1
        assert f" {num_hops + 1} variables have the value" in problem
        assert item.max_new_tokens == 30


def test_the_solved_example_is_right_and_of_other_names(word_tokenizer):
    for item in make("variable_tracking", word_tokenizer, [1024], 30, num_chains=2):
        solved, problem = item.prompt.split("\n\n")
        prompt, answer = solved.rsplit(": ", 1)
        assert solve_variables(f"{prompt}:") == answer.split()
        names = [set(re.findall(r"[A-Z]{5}|\d{5}", part)) for part in (solved, problem)]
        assert not names[0] & names[1]


def test_no_or_more_solved_examples(word_tokenizer):
    for num_fewshot in (0, 3):
        (item,) = make("variable_tracking", word_tokenizer, [1024], 1, num_fewshot=num_fewshot)
        assert item.prompt.count("\nQuestion: ") == num_fewshot + 1


def test_assignments_lie_in_noise_or_in_a_text(word_tokenizer):
    (item,) = make("variable_tracking", word_tokenizer, [1024], 1)
    assert item.prompt.count("The rain falls") > 5
    (item,) = make("variable_tracking", word_tokenizer, [1024], 1, text="It was late. Nobody spoke.")
    assert "It was late. Nobody spoke. It was late." in item.prompt
