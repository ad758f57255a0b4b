"""Scorers: what an answer to one item is worth, from 0 to 1. Pure functions of item and answer.

| scorer | metrics | rule |
| --- | --- | --- |
| choice_accuracy | acc, acc_norm | the right choice is the likeliest; the likeliest per character |
| string_match_all | string_match_all | RULER: share of the references that stand in the answer |
| string_match_part | string_match_part | RULER's for questions: any reference stands in the answer |
| babilong_match | babilong | BABILong: the first sentence names the reference and no other label |
| exact_match | exact_match | SQuAD: a reference, but for case, punctuation, articles and white space |
| token_f1 | f1 | SQuAD: harmonic mean of precision and recall of words, best reference |
| rouge_l | rouge_l | ROUGE-L: the same of the longest common subsequence of stems, best reference |
"""

from __future__ import annotations

import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ssmlora_dist.errors import ModelError
from ssmlora_dist.evaluation.items import ChoiceAnswer, ChoiceItem, GenerationAnswer, GenerationItem, Scorer

BABI_LOCATIONS = frozenset({"bathroom", "bedroom", "garden", "hallway", "kitchen", "office"})

BABILONG_LABELS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), BABI_LOCATIONS),
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), frozenset({"no", "yes"})),
    "qa5": frozenset({"bill", "fred", "jeff", "mary", "apple", "football", "milk"}),
    "qa7": frozenset({"none", "one", "two", "three"}),
    "qa8": frozenset({"apple", "football", "milk", "nothing"}),
    "qa10": frozenset({"maybe", "no", "yes"}),
    "qa14": frozenset({"bedroom", "cinema", "kitchen", "office", "park", "school"}),
    "qa15": frozenset({"cat", "mouse", "sheep", "wolf"}),
    "qa16": frozenset({"gray", "green", "white", "yellow"}),
    "qa19": frozenset("e,e e,n e,s n,e n,n n,w s,e s,s s,w w,n w,s w,w".split()),
    "qa20": frozenset({"bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"}),
}
"""The answers that each bAbI task knows, in lower case; the tasks go by their published names."""


def choice_accuracy(item: ChoiceItem, answer: ChoiceAnswer) -> dict[str, float]:
    """`acc`: the right choice has the highest log-likelihood. `acc_norm`: the highest per character.

    Both as lm-eval has them: the first of equals wins, and the space that parts a choice from its prompt is
    not counted among its characters (any further ones are).

    Raises:
        ModelError: a log-likelihood is not a number.
    """
    log_likelihoods = answer.log_likelihoods
    if len(log_likelihoods) != len(item.choices):
        raise ValueError(f"{len(log_likelihoods)} log-likelihoods for {len(item.choices)} choices")
    if any(map(math.isnan, log_likelihoods)):
        raise ModelError(
            f"item {item.id}: a choice has the log-likelihood NaN, so the model's logits are not finite; "
            "evaluate in bfloat16 or float32, or mend the adapter"
        )
    per_character = [
        log_likelihood / len(choice.removeprefix(" "))
        for log_likelihood, choice in zip(log_likelihoods, item.choices, strict=True)
    ]
    return {
        "acc": float(_argmax(log_likelihoods) == item.label),
        "acc_norm": float(_argmax(per_character) == item.label),
    }


def string_match_all(item: GenerationItem, answer: GenerationAnswer) -> dict[str, float]:
    """Share of the references that are substrings of the answer, whatever their case."""
    return {"string_match_all": sum(_found(item, answer)) / len(item.references)}


def string_match_part(item: GenerationItem, answer: GenerationAnswer) -> dict[str, float]:
    """1 if any reference is a substring of the answer, whatever its case, else 0."""
    return {"string_match_part": float(any(_found(item, answer)))}


def babilong_match(labels: Iterable[str]) -> Scorer:
    """The scorer of a BABILong task; it reads the question in `item.metadata["question"]`.

    Of the answer, up to its first full stop and before any `<context>` or `<example>`, all in lower case: of
    the task's labels it names the reference and no other, except that those in the question do not count. A
    reference such as `apple,milk` is several labels, each of which must be named.

    Deviation: a label inside a longer one is not named by it. Under the published rule `none` also names
    `one`, so that no answer to qa7 whose reference is `none` could ever be right. Only qa7 has such labels.

    Args:
        labels: all answers that the task knows (`BABILONG_LABELS`).
    """
    known = frozenset(label.lower() for label in labels)

    def score(item: GenerationItem, answer: GenerationAnswer) -> dict[str, float]:
        said = re.split(r"\.|<context>|<example>", answer.text.lower(), maxsplit=1)[0]
        named = _named(known, said) - _named(known, item.metadata["question"].lower())
        return {"babilong": float(any(named == _babi_labels(text) for text in item.references))}

    return score


def exact_match(item: GenerationItem, answer: GenerationAnswer) -> dict[str, float]:
    """1 if the answer equals a reference once both are normalised (see `normalize_answer`), else 0."""
    text = normalize_answer(answer.text)
    return {"exact_match": float(any(text == normalize_answer(reference) for reference in item.references))}


def token_f1(item: GenerationItem, answer: GenerationAnswer) -> dict[str, float]:
    """F1 of the normalised words, each counted as often as it occurs; of the best reference.

    Where nothing is left of the answer or of a reference they agree only if nothing is left of both: the rule
    of SQuAD 2.0.
    """
    words = normalize_answer(answer.text).split()
    return {"f1": max(_f1(words, normalize_answer(reference).split()) for reference in item.references)}


def rouge_l(item: GenerationItem, answer: GenerationAnswer) -> dict[str, float]:
    """F-measure of ROUGE-L, of the best reference.

    Words of more than three letters are stemmed (Porter), as the original ROUGE does for summaries and as
    most published tables have it; without stems scores come out lower.
    """
    best = _rouge_scorer().score_multi(item.references, answer.text)
    return {"rouge_l": float(best["rougeL"].fmeasure)}


SCORERS: Mapping[str, Callable[[Any, Any], dict[str, float]]] = {
    "choice_accuracy": choice_accuracy,
    "string_match_all": string_match_all,
    "string_match_part": string_match_part,
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge_l": rouge_l,
}
"""By the names that settings use; all but the first are of generated answers."""


def all_scores(*scorers: Scorer) -> Scorer:
    """One scorer that gives the metrics of several."""

    def score(item: Any, answer: Any) -> dict[str, float]:
        return {name: value for scorer in scorers for name, value in scorer(item, answer).items()}

    return score


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no `a`, `an`, `the`, single spaces."""
    bare = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def _argmax(values: Iterable[float]) -> int:
    ordered = list(values)
    return ordered.index(max(ordered))


def _found(item: GenerationItem, answer: GenerationAnswer) -> list[bool]:
    text = answer.text.lower()
    return [reference.lower() in text for reference in item.references]


def _named(labels: frozenset[str], text: str) -> frozenset[str]:
    """The labels that stand in a text, other than inside longer labels."""
    named = set()
    for label in labels:
        rest = text
        for longer in labels:
            if label in longer and label != longer:
                rest = rest.replace(longer, " ")
        if label in rest:
            named.add(label)
    return frozenset(named)


def _babi_labels(reference: str) -> frozenset[str]:
    # A pair of directions as of qa19 (`n,e`) is one label.
    parts = reference.lower().split(",") if len(reference) > 3 else [reference.lower()]
    return frozenset(parts)


def _f1(words: list[str], reference_words: list[str]) -> float:
    if not words or not reference_words:
        return float(words == reference_words)
    num_common = (Counter(words) & Counter(reference_words)).total()
    return 2 * num_common / (len(words) + len(reference_words))


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
