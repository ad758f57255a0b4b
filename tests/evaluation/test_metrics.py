"""Scorers by hand, and against the libraries whose rules they follow."""

from __future__ import annotations

import random

import pytest

from ssmlora_dist.errors import ModelError
from ssmlora_dist.evaluation.items import ChoiceAnswer, ChoiceItem, GenerationAnswer, GenerationItem
from ssmlora_dist.evaluation.metrics import (
    BABILONG_LABELS,
    SCORERS,
    all_scores,
    babilong_match,
    choice_accuracy,
    exact_match,
    normalize_answer,
    rouge_l,
    string_match_all,
    string_match_part,
    token_f1,
)

SEED = 20
NUM_PAIRS = 200
# Sums and products of a few float64 values, taken in another order.
ROUNDING = 1e-12

VOCABULARY = (
    "the a an The cat cats dog's, running Runs run! over-fence [fence] isn't 42 4.2 naïve Paris paris — "
    "'quoted' theatre anthem A.M. the, university universal"
).split(" ")


def generation(*references: str, **metadata) -> GenerationItem:
    return GenerationItem("0", "Q:", references, max_new_tokens=8, metadata=metadata)


def scored(scorer, item, text: str) -> float:
    (value,) = scorer(item, GenerationAnswer(text)).values()
    return value


def random_pairs() -> list[tuple[str, list[str]]]:
    """Answers with one to three references of overlapping words; a few have none, or articles alone."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)

    def text(least: int) -> str:
        return " ".join(rng.choices(VOCABULARY, k=rng.randint(least, 8)))

    return [(text(0), [text(1) for _ in range(rng.randint(1, 3))]) for _ in range(NUM_PAIRS)]


@pytest.mark.parametrize(
    ("log_likelihoods", "acc", "acc_norm"),
    [
        ((-1.0, -3.0), 1.0, 1.0),
        # Per character -2/2 and -3/4: the longer one.
        ((-2.0, -3.0), 1.0, 0.0),
        # Per character -2/2 and -4/4, the same: the first; with the space counted it were the second.
        ((-2.0, -4.0), 1.0, 1.0),
        ((-3.0, -3.0), 1.0, 0.0),
        ((float("-inf"), -9.0), 0.0, 0.0),
    ],
)
def test_choices(log_likelihoods, acc, acc_norm):
    item = ChoiceItem("0", "Q:", (" no", " yeah"), label=0)
    assert choice_accuracy(item, ChoiceAnswer(log_likelihoods)) == {"acc": acc, "acc_norm": acc_norm}


def test_choices_without_a_likelihood_are_no_wrong_answer():
    item = ChoiceItem("7", "Q:", (" no", " yes"), label=0)
    with pytest.raises(ModelError, match=r"item 7: .* NaN.*bfloat16"):
        choice_accuracy(item, ChoiceAnswer((float("nan"), -1.0)))
    with pytest.raises(ValueError, match="1 log-likelihoods for 2 choices"):
        choice_accuracy(item, ChoiceAnswer((-1.0,)))


def test_choices_are_scored_as_in_lm_eval():
    """Delimiters of one space, no space and, as of COPA, two; random log-likelihoods, ties among them."""
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.api.task import ConfigurableTask

    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for _ in range(NUM_PAIRS):
        choices = [" " * rng.randint(0, 1) + "x" * rng.randint(1, 9) for _ in range(rng.randint(2, 5))]
        document = {"question": "q", "choices": choices, "label": rng.randrange(len(choices))}
        delimiter = rng.choice([" ", ""]) if all(choice[0] == "x" for choice in choices) else " "
        task = ConfigurableTask(
            config={
                "task": "made_up",
                "custom_dataset": lambda document=document, **_: datasets.DatasetDict(
                    {"test": datasets.Dataset.from_list([document])}
                ),
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "question",
                "doc_to_choice": "choices",
                "doc_to_target": "label",
                "target_delimiter": delimiter,
            }
        )
        log_likelihoods = [float(-rng.randint(1, 12)) for _ in choices]
        expected = task.process_results(document, [(value, False) for value in log_likelihoods])
        item = ChoiceItem("0", "q", tuple(delimiter + choice for choice in choices), document["label"])
        actual = choice_accuracy(item, ChoiceAnswer(tuple(log_likelihoods)))
        assert actual == {"acc": expected["acc"], "acc_norm": expected["acc_norm"]}, (
            document,
            log_likelihoods,
        )


def test_ruler():
    item = generation("Blue-7", "31415", "x y", "")
    assert scored(string_match_all, item, "it is blue-7, X\nY") == 0.5
    assert scored(string_match_all, item, "BLUE-7 31415 x Y") == 1.0
    assert scored(string_match_part, generation("a1", "b2"), "say B2.") == 1.0
    assert scored(string_match_part, generation("a1", "b2"), "a 1") == 0.0


@pytest.mark.parametrize(
    ("task", "reference", "text", "expected"),
    [
        ("qa1", "kitchen", "The Kitchen.", 1.0),
        ("qa1", "kitchen", "the kitchen or the office", 0.0),
        ("qa1", "kitchen", "the kitchen. Not the office.", 1.0),
        ("qa1", "kitchen", "kitchen <example> office", 1.0),
        ("qa1", "kitchen", "kitchen<context>garden", 1.0),
        # Cutting at `Question` comes after lower case in the published code, so it never cuts.
        ("qa1", "kitchen", "kitchen Question: is it the office?", 0.0),
        # The hallway is in the question, so naming it is no second answer, and never the right one.
        ("qa1", "kitchen", "from the hallway to the kitchen", 1.0),
        ("qa1", "hallway", "the hallway", 0.0),
        ("qa1", "kitchen", "", 0.0),
        ("qa5", "Bill", "bill", 1.0),
        ("qa7", "none", "none", 1.0),
        ("qa7", "one", "none", 0.0),
        ("qa7", "none", "one", 0.0),
        ("qa7", "one", "one or none", 0.0),
        ("qa8", "apple,milk", "the milk and the apple", 1.0),
        ("qa8", "apple,milk", "apple", 0.0),
        ("qa8", "apple,milk", "apple, milk, football", 0.0),
        ("qa19", "n,e", "n,e", 1.0),
        ("qa19", "n,e", "n,e,e", 0.0),
    ],
)
def test_babilong(task, reference, text, expected):
    item = generation(reference, question="Where was it before the hallway?")
    assert scored(babilong_match(BABILONG_LABELS[task]), item, text) == expected


def test_babilong_labels_are_of_all_twenty_tasks():
    assert set(BABILONG_LABELS) == {f"qa{number}" for number in range(1, 21)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat's-eye, a an!", "catseye"),
        ("theatre anthem", "theatre anthem"),
        ("a.m.", "am"),
        ("the-end the end", "theend end"),
        ("“The” naïve", "“ ” naïve"),
    ],
)
def test_normal_form(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("references", "text", "match", "f1"),
    [
        (("the red house", "hut"), "A Red House!", 1.0, 1.0),
        (("the red house", "hut"), "a hut", 1.0, 1.0),
        # Two of two words right, two of three found: 2 * 1 * 2/3 / (1 + 2/3).
        (("big red house",), "red house", 0.0, 0.8),
        (("red red house",), "red", 0.0, 0.5),
        (("house",), "", 0.0, 0.0),
        (("the",), "a", 1.0, 1.0),
    ],
)
def test_squad(references, text, match, f1):
    assert scored(exact_match, generation(*references), text) == match
    assert scored(token_f1, generation(*references), text) == pytest.approx(f1, abs=ROUNDING)


def test_squad_agrees_with_transformers():
    metrics = pytest.importorskip("transformers.data.metrics.squad_metrics", reason="older transformers only")
    for text, references in random_pairs():
        item = generation(*references)
        assert scored(exact_match, item, text) == max(metrics.compute_exact(r, text) for r in references)
        expected = max(metrics.compute_f1(r, text) for r in references)
        assert scored(token_f1, item, text) == pytest.approx(expected, abs=ROUNDING), (text, references)


def test_squad_agrees_with_lm_eval():
    """Its rule is that of SQuAD 1.1, where an answer and a reference without words share nothing."""
    pytest.importorskip("lm_eval")
    from lm_eval.tasks.super_glue.record.t5_utils import normalize_squad, squad_em_agg, squad_f1_agg

    for text, references in random_pairs():
        item = generation(*references)
        pairs = [[(text, f"0_{reference}")] for reference in references]
        assert normalize_answer(text) == normalize_squad(text)
        assert scored(exact_match, item, text) == max(map(squad_em_agg, pairs))
        if normalize_answer(text):
            expected = max(map(squad_f1_agg, pairs))
            assert scored(token_f1, item, text) == pytest.approx(expected, abs=ROUNDING), (text, references)


def test_rouge_l_agrees_with_its_library():
    from rouge_score.rouge_scorer import RougeScorer

    library = RougeScorer(["rougeL"], use_stemmer=True)
    values = []
    for text, references in random_pairs():
        expected = max(library.score(reference, text)["rougeL"].fmeasure for reference in references)
        values.append(scored(rouge_l, generation(*references), text))
        assert values[-1] == pytest.approx(expected, abs=ROUNDING), (text, references)
    assert min(values) == 0.0
    assert max(values) == 1.0
    assert len(set(values)) > 20


def test_rouge_l_by_hand():
    # Of 3 and 4 words, the common subsequence is `cat sit mat` by stems: 2 * 1 * 3/4 / (1 + 3/4).
    assert scored(rouge_l, generation("cats sitting (on) MATS"), "cat sits mat") == pytest.approx(6 / 7)


def test_several_scorers_in_one():
    both = all_scores(token_f1, exact_match)
    assert both(generation("red house"), GenerationAnswer("house")) == {
        "f1": pytest.approx(2 / 3),
        "exact_match": 0.0,
    }


def test_scorers_by_name_give_values_from_0_to_1():
    for name, scorer in SCORERS.items():
        if name == "choice_accuracy":
            continue
        for text, references in random_pairs():
            assert all(
                0.0 <= value <= 1.0
                for value in scorer(generation(*references), GenerationAnswer(text)).values()
            )
