"""Scores of single examples put together, by group and over ranks."""

from __future__ import annotations

from collections.abc import Sequence

from ssmlora_dist.evaluation.teacher_forced import ExampleScore, Score, summarize

SCORES = [
    ExampleScore("64", loss_sum=2.0, num_targets=1, exact=True),
    ExampleScore("64", loss_sum=4.0, num_targets=3, exact=False),
    ExampleScore("128", loss_sum=1.0, num_targets=4, exact=True),
]


def test_losses_are_means_over_tokens_and_matches_means_over_examples() -> None:
    assert summarize(SCORES, ["64", "128"]) == {
        "64": Score(2, 6.0 / 4, 0.5),
        "128": Score(1, 1.0 / 4, 1.0),
        "all": Score(3, 7.0 / 8, 2 / 3),
    }


def test_groups_come_in_the_order_given_and_all_last() -> None:
    assert list(summarize(SCORES, ["128", "64"])) == ["128", "64", "all"]


def test_a_group_of_which_no_rank_has_an_example_is_left_out() -> None:
    assert list(summarize(SCORES, ["64", "128", "256"])) == ["64", "128", "all"]


def test_no_example_at_all() -> None:
    assert summarize([], ["64"]) == {}


def test_ranks_add_up_to_the_whole() -> None:
    """Each rank sends the same number of values, whatever examples it has."""
    groups = ["64", "128"]
    sent: list[list[float]] = []

    def send(values: Sequence[float]) -> list[float]:
        sent.append(list(values))
        return list(values)

    for share in (SCORES[:1], SCORES[1:], []):
        summarize(share, groups, send)
    assert len({len(values) for values in sent}) == 1

    def total(values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*sent, strict=True)]

    assert summarize([], groups, total) == summarize(SCORES, groups)
