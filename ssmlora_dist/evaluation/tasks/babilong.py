"""Questions of bAbI whose facts are spread through a text, as of BABILong (arXiv 2406.10149)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import GenerationItem
from ssmlora_dist.evaluation.tasks.haystack import Puzzle, background, hidden_fact_items
from ssmlora_dist.evaluation.tasks.lengths import Sampling, TokenCounter

MAX_NEW_TOKENS = 15

OPENING = (
    "Facts are scattered through the text below. Answer the question at its end by these facts alone; where "
    "they change, the latest holds. Answer in as few words as possible.\nText:"
)
QUESTION = "\nQuestion: {question}\nAnswer:"

LINE = re.compile(r"(\d+) (.*)")
FORM = "`NUMBER FACT` or `NUMBER QUESTION<tab>ANSWER<tab>NUMBERS OF FACTS`"
# Some copies of the files have bars for tabs, which no fact has.
SEPARATOR = re.compile(r"[\t|]")


@dataclass(frozen=True)
class BabiQuestion:
    """A question of a bAbI file.

    Args:
        where: file and line.
        facts: all that the story has told before the question, in order.
        question: the question.
        answer: a word, or several joined by commas.
    """

    where: str
    facts: tuple[str, ...]
    question: str
    answer: str


def read_babi(path: str | Path) -> list[BabiQuestion]:
    """Reads the questions of a bAbI task file in its numbered format, which all of its 20 tasks share.

    Raises:
        DataError: the file is missing, has no question, or has a line that is out of form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}); name a bAbI task file") from error
    questions: list[BabiQuestion] = []
    facts: dict[int, str] = {}
    last = 0
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{row}"
        match = LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{where}: {line[:80]!r} is out of form; a line is {FORM}")
        number = int(match[1])
        if number == 1:
            facts = {}
        elif number != last + 1 or not last:
            raise DataError(
                f"{where}: line {number} of a story comes after its line {last}; number them from 1 on"
            )
        last = number
        question, *rest = (part.strip() for part in SEPARATOR.split(match[2]))
        if not rest:
            facts[number] = question
        else:
            questions.append(_read_question(where, facts, question, rest))
    if not questions:
        raise DataError(f"{path}: no question in it; lines with one are {FORM}")
    return questions


def _read_question(where: str, facts: dict[int, str], question: str, rest: Sequence[str]) -> BabiQuestion:
    answer, *supports = rest
    if not question or not answer or len(supports) > 1:
        raise DataError(f"{where}: a question must have its text, a tab and its answer; a line is {FORM}")
    for support in " ".join(supports).split():
        if not support.isdecimal() or int(support) not in facts:
            raise DataError(f"{where}: {support!r} is not the number of a fact told before the question")
    if not facts:
        raise DataError(f"{where}: a question before any fact; a line is {FORM}")
    return BabiQuestion(where, tuple(facts.values()), question, answer)


def babilong(
    tokenizer: Any,
    *,
    path: str | Path,
    task: str,
    lengths: Sequence[int],
    num_examples: int,
    split: str,
    seed: int,
    first_question: int = 0,
    max_facts: int | None = None,
    text: str | None = None,
) -> Iterator[GenerationItem]:
    """Generates items of a bAbI file's questions whose facts are spread, in their order, through a text.

    Items take the file's questions one after another, at every length the same ones. Files or ranges of
    questions decide what is training and what is test. Other than in BABILong: the wording is our own and
    one for all tasks, without solved examples; the text is not books unless it is given; no sentence of it
    is left out for being long or short. Facts lie anywhere, and all of the length is used.

    Args:
        tokenizer: of the model.
        path: a bAbI task file.
        task: its name, such as `qa1`.
        lengths: tokens of the prompt and of the answer's budget together. Prompts are within one word of
            it, and never above.
        num_examples: of each length.
        split: `train`, `validation` or `test`; other places and passages, but the questions of the file.
        seed: of places and passages.
        first_question: how many questions of the file are left to others.
        max_facts: leave out questions behind more facts.
        text: what facts are spread through, instead of the language reference of the interpreter.

    Returns:
        Items of which number i, whatever the number of examples, is always the same, with the question in
        their metadata. The answer ends with its line.

    Raises:
        DataError: a length is too short, the text is empty, the file is out of form or has too few questions.
    """
    questions = [
        question for question in read_babi(path) if max_facts is None or len(question.facts) <= max_facts
    ]
    chosen = questions[first_question : first_question + num_examples]
    if len(chosen) < num_examples:
        limit = "" if max_facts is None else f" with at most {max_facts} facts"
        raise DataError(
            f"{path}: {len(questions)} questions{limit} are too few for {num_examples} from number "
            f"{first_question} on; ask for fewer or name a longer file"
        )
    sampling = Sampling(f"babilong_{task}", tuple(lengths), num_examples, split, seed)
    counter = TokenCounter(tokenizer)
    puzzles = [
        Puzzle(
            OPENING,
            question.facts,
            QUESTION.format(question=question.question),
            (question.answer,),
            f" {question.answer}",
            metadata={"question": question.question, "num_facts": len(question.facts)},
        )
        for question in chosen
    ]
    return hidden_fact_items(
        counter, sampling, background(counter, text), puzzles, MAX_NEW_TOKENS, stop=("\n",)
    )
