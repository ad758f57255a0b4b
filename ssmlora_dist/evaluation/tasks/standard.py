"""Classic and long-input tasks whose data are published: where they are, how they ask, how they are scored.

SuperGLUE's tasks and `race_harness` ask in the very words of lm-eval 0.4.13, with its choices, and are scored
as there. They read the hub's records and, where those differ, the records of the original files.

| task | as in lm-eval | remarks |
| --- | --- | --- |
| boolq, cb, copa, wic, wsc | the same name | `copa` keeps lm-eval's two spaces before a choice |
| rte | sglue_rte | |
| multirc | its prompt and choices | but not its labels: there a right answer counts as wrong |
| multirc_harness | multirc | lm-eval's labels too, to compare with its figures; not a measure of anything |
| race | | one item for each question of an article |
| race_harness | race | one item for each article: its last question, the others before it with answers |
| narrativeqa | | questions about a story's summary, short free answers |
| narrativeqa_story | | the same about the whole story |
| qmsum | | one item for each query about a meeting, answered by a paragraph |
| quality | | four choices for each question about an article |

The last four have the prompt of the training format `long_document_qa`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import FailedItem, Item, Scorer
from ssmlora_dist.evaluation.metrics import all_scores, choice_accuracy, exact_match, rouge_l, token_f1
from ssmlora_dist.evaluation.tasks.records import (
    ChoiceFormat,
    GenerationFormat,
    ItemFormat,
    Preparation,
    items_of_records,
)
from ssmlora_dist.multiple_choice import label_position
from ssmlora_dist.open_questions import DOCUMENT_PROMPT
from ssmlora_dist.records import Record, RecordView, UnusedFields

NO_YES = (" no", " yes")
ENTAILMENT = {"entailment": 0, "not_entailment": 1, "0": 0, "1": 1}
COMMITMENT = {"entailment": 0, "contradiction": 1, "neutral": 2, "0": 0, "1": 1, "2": 2}
# Of published data it is known how they count, whatever their choices say.
LETTERS = {"A": 0, "B": 1, "C": 2, "D": 3}
POSITIONS = {"0": 0, "1": 1, "2": 2, "3": 3}
MULTIRC_PROMPT = "{paragraph}\nQuestion: {question}\nAnswer:"
MULTIRC_CHOICES = tuple(f" {{answer}}\nIs the answer correct? {word}" for word in ("yes", "no"))
COPA_CONNECTORS = {"cause": "because", "effect": "therefore"}
RACE_BLANK = "  _  ."


@dataclass(frozen=True)
class StandardTask:
    """A task with published data.

    Args:
        name: of the task.
        hub: name of a data set on the hub that has it.
        subset: the data set's configuration.
        split: what results are usually given of, among the splits whose answers are public.
        format: makes an item of a prepared record.
        prepare: makes prepared records of one that was read; without it they are the same.
        score: of an answer.
        metric: the score that stands for the task, as its paper reports it.
    """

    name: str
    hub: str
    subset: str | None
    split: str
    format: ItemFormat
    prepare: Preparation | None = None
    score: Scorer = choice_accuracy
    metric: str = "acc"


def items_of(
    task: StandardTask,
    records: Iterable[Record],
    limit: int | None = None,
    unused: UnusedFields | None = None,
) -> Iterator[Item | FailedItem]:
    """The items of a standard task; see `items_of_records`.

    Args:
        task: one of `STANDARD`.
        records: of its data set.
        limit: the most items, failed ones included.
        unused: told the records whose items can be used.

    Raises:
        DataError: not one of the records can be used.
    """
    return items_of_records(records, task.format, task.name, task.prepare, limit, unused)


def _copa(record: Record) -> Iterator[Record]:
    """The premise runs on into the choices: no full stop after it, no capital after the connector."""
    view = RecordView(record, {})
    asked = view.text("question")
    if asked not in COPA_CONNECTORS:
        raise DataError(
            f"{view.where}: field 'question' holds {asked!r}; allowed: {' or '.join(COPA_CONNECTORS)}; mend "
            "the record"
        )
    choices = {name: view.text(name) for name in ("choice1", "choice2")}
    prepared = {name: text[:1].lower() + text[1:] for name, text in choices.items()}
    premise = f"{view.text('premise').strip()[:-1]} {COPA_CONNECTORS[asked]}"
    yield record.derived({**prepared, "premise": premise, "label": view.value("label")})


def _wic(record: Record) -> Iterator[Record]:
    view = RecordView(record, {})
    start, end = (_whole_number(view, name) for name in ("start1", "end1"))
    yield record.derived({**record.values, "word": view.text("sentence1")[start:end]})


def _wsc(record: Record) -> Iterator[Record]:
    """Marks the pronoun, which is found by counting words, and undoes the spaces of a tokenised text."""
    names = ("span1_text", "span2_text", "span2_index")
    is_nested = isinstance(record.values.get("target"), Mapping)
    view = RecordView(record, {name: f"target.{name}" for name in names} if is_nested else {})
    text, pronoun = view.text("text"), view.text("span2_text")
    before = " ".join(text.split()[: _whole_number(view, "span2_index")])
    after = text[len(before) + len(pronoun) + 1 :]
    yield Record(
        {
            "passage": _without_token_spaces(f"{before} *{pronoun}*{after}"),
            "pronoun": pronoun,
            "noun": view.text("span1_text"),
            "label": view.value("label"),
        },
        record.where,
    )


def _without_token_spaces(text: str) -> str:
    for spaced in (" n't", " )", "( ", '" ', ' "'):
        text = text.replace(spaced, spaced.strip())
    return re.sub(" (?=['.,])", "", text)


def _race_harness(record: Record) -> Iterator[Record]:
    """All questions of an article in one text, the hub's list of which is the text of a Python list."""
    problems = record.values.get("problems")
    if isinstance(problems, str):
        try:
            record = record.derived({**record.values, "problems": ast.literal_eval(problems)})
        except (ValueError, SyntaxError):
            raise DataError(f"{record.where}: field 'problems' is not the text of a list; mend it") from None
    *answered, asked = _objects(RecordView(record, {}), "problems", "question")
    text = f"Article: {RecordView(record, {}).text('article')}\n\n"
    for problem in answered:
        question, answer = RecordView(problem, {}).text("question"), _race_answer(RecordView(problem, {}))
        if question.endswith(RACE_BLANK):
            text += f"{question.removesuffix(RACE_BLANK[1:])}{answer}\n"
        else:
            text += f"Question: {question}\nAnswer: {answer}\n"
    text += RecordView(asked, {}).text("question")
    yield Record({**asked.values, "text": text}, asked.where)


def _race_answer(problem: RecordView) -> str:
    options = problem.value("options")
    texts = [problem.as_text(option, "options") for option in (options if isinstance(options, list) else [])]
    answer = problem.value("answer")
    return texts[label_position(answer, [text.strip() for text in texts], problem, LETTERS, "answer")]


def _narrativeqa(document: str) -> Preparation:
    """For the hub's records with a path to the document, and for those with `passage` and `answer`."""
    hub = {"document": document, "question": "question.text", "references": "answers.text"}
    flat = {"document": "passage", "question": "question", "references": "answer"}

    def prepare(record: Record) -> Iterator[Record]:
        fields = hub if isinstance(record.values.get("document"), Mapping) else flat
        view = RecordView(record, fields)
        yield Record({name: view.value(name) for name in fields}, record.where)

    return prepare


def _qmsum(record: Record) -> Iterator[Record]:
    """A meeting with its queries, general ones first, or a record of LongBench with one query."""
    if "meeting_transcripts" not in record.values:
        fields = {"document": "context", "query": "question", "answer": "answers"}
        view = RecordView(record, fields)
        yield Record({name: view.value(name) for name in fields}, record.where)
        return
    view = RecordView(record, {"queries": ("general_query_list", "specific_query_list")})
    turns = [RecordView(turn, {}) for turn in _objects(view, "meeting_transcripts", "turn")]
    document = "\n".join(f"{turn.text('speaker')}: {turn.text('content')}" for turn in turns)
    for query in _objects(view, "queries", "query"):
        yield Record({**query.values, "document": document}, query.where)


def _quality(record: Record) -> Iterator[Record]:
    """The hub has a record for each question, the original files one for each article and writer."""
    view = RecordView(record, {})
    document = view.text("article")
    if "questions" not in record.values:
        yield record.derived({**record.values, "document": document})
        return
    for question in _objects(view, "questions", "question"):
        # Counted from 1 in these files.
        answer = _whole_number(RecordView(question, {}), "gold_label") - 1
        yield Record({**question.values, "document": document, "answer": answer}, question.where)


def _objects(view: RecordView, name: str, noun: str) -> list[Record]:
    """The objects of a list field as records."""
    value = view.value(name)
    if not isinstance(value, list) or not value or not all(isinstance(part, Mapping) for part in value):
        raise DataError(
            f"{view.where}: field {name!r} must be a list of objects, at least one; mend the record"
        )
    return [Record(part, f"{view.where}, {noun} {number}") for number, part in enumerate(value, start=1)]


def _multirc(record: Record) -> Iterator[Record]:
    """The hub has a record for each answer, the original files one for each paragraph."""
    if "passage" not in record.values:
        yield record
        return
    view = RecordView(record, {"paragraph": "passage.text", "questions": "passage.questions"})
    paragraph = view.text("paragraph")
    for question in _objects(view, "questions", "question"):
        asked = RecordView(question, {}).text("question")
        for answer in _objects(RecordView(question, {}), "answers", "answer"):
            given = RecordView(answer, {"answer": "text"})
            values = {"answer": given.text("answer"), "label": given.value("label")}
            yield Record({"paragraph": paragraph, "question": asked, **values}, answer.where)


def _whole_number(view: RecordView, name: str) -> int:
    value = view.value(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(
            f"{view.where}: field {name!r} holds {value!r} where a whole number is needed; mend it"
        )
    return value


def _super_glue(
    name: str, format: ItemFormat, prepare: Preparation | None = None, subset: str | None = None
) -> StandardTask:
    return StandardTask(name, "aps/super_glue", subset or name, "validation", format, prepare)


_RACE_FIELDS = {"choices": "options", "label": "answer"}
_NARRATIVEQA_SCORE = all_scores(token_f1, exact_match, rouge_l)
_NARRATIVEQA_FORMAT = GenerationFormat(DOCUMENT_PROMPT, max_new_tokens=64)

STANDARD: Mapping[str, StandardTask] = {
    task.name: task
    for task in (
        _super_glue("boolq", ChoiceFormat("{passage}\nQuestion: {question}?\nAnswer:", NO_YES)),
        _super_glue(
            "rte",
            ChoiceFormat(
                "{premise}\nQuestion: {hypothesis} True or False?\nAnswer:",
                (" True", " False"),
                labels=ENTAILMENT,
            ),
        ),
        _super_glue(
            "cb",
            ChoiceFormat(
                "{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:",
                (" True", " False", " Neither"),
                labels=COMMITMENT,
            ),
        ),
        _super_glue("copa", ChoiceFormat("{premise}", ("  {choice1}", "  {choice2}")), _copa),
        _super_glue(
            "wic",
            ChoiceFormat(
                "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Is the word '{word}' used in "
                "the same way in the two sentences above?\nAnswer:",
                NO_YES,
            ),
            _wic,
        ),
        _super_glue(
            "wsc",
            ChoiceFormat(
                'Passage: {passage}\nQuestion: In the passage above, does the pronoun "*{pronoun}*" refer to '
                '"*{noun}*"?\nAnswer:',
                NO_YES,
            ),
            _wsc,
            subset="wsc.fixed",
        ),
        _super_glue(
            "multirc",
            ChoiceFormat(MULTIRC_PROMPT, MULTIRC_CHOICES, labels={"1": 0, "0": 1, "true": 0, "false": 1}),
            _multirc,
        ),
        _super_glue(
            "multirc_harness",
            ChoiceFormat(MULTIRC_PROMPT, MULTIRC_CHOICES, labels={"1": 1, "0": 0, "true": 1, "false": 0}),
            _multirc,
            subset="multirc",
        ),
        StandardTask(
            "race",
            "ehovy/race",
            "high",
            "test",
            ChoiceFormat(
                "Article: {article}\n\nQuestion: {question}\nAnswer:", fields=_RACE_FIELDS, labels=LETTERS
            ),
        ),
        StandardTask(
            "race_harness",
            "EleutherAI/race",
            "high",
            "test",
            ChoiceFormat("{text}", fields=_RACE_FIELDS, labels=LETTERS),
            _race_harness,
        ),
        *(
            StandardTask(
                name,
                "deepmind/narrativeqa",
                None,
                "test",
                _NARRATIVEQA_FORMAT,
                _narrativeqa(document),
                _NARRATIVEQA_SCORE,
                "f1",
            )
            for name, document in (
                ("narrativeqa", "document.summary.text"),
                ("narrativeqa_story", "document.text"),
            )
        ),
        StandardTask(
            "qmsum",
            "Xnhyacinth/LongBench",
            "qmsum",
            "test",
            GenerationFormat(
                DOCUMENT_PROMPT, max_new_tokens=256, fields={"question": "query", "references": "answer"}
            ),
            _qmsum,
            rouge_l,
            "rouge_l",
        ),
        StandardTask(
            "quality",
            "emozilla/quality",
            None,
            "validation",
            ChoiceFormat(DOCUMENT_PROMPT, fields=_RACE_FIELDS, labels=POSITIONS),
            _quality,
        ),
    )
}
"""By name."""
