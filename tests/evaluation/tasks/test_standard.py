"""Standard tasks: the same strings as lm-eval's, both kinds of records, records that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import ChoiceItem, FailedItem, GenerationAnswer, GenerationItem
from ssmlora_dist.evaluation.tasks.standard import STANDARD, items_of
from ssmlora_dist.records import Record

WSC_TEXT = "Ann said ( aloud ) that she did n't  trust Bob , who 's late . Then \" he \" left ."

# Our task -> its name in lm-eval and records as of the hub; white space, quotes and odd characters meant.
HUB_RECORDS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "boolq": (
        "boolq",
        [
            {"passage": "Tea -- {hot} drink.\n", "question": "is tea hot", "label": 1},
            {"passage": "Ice  is {{cold}}. ", "question": "is ice 'hot' ", "label": 0},
        ],
    ),
    "rte": (
        "sglue_rte",
        [
            {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
            {"premise": "It rains. ", "hypothesis": "“Dry”", "label": 1},
        ],
    ),
    "cb": (
        "cb",
        [{"premise": "A: I think\nB: so.", "hypothesis": "it is so", "label": label} for label in (0, 1, 2)],
    ),
    "copa": (
        "copa",
        [
            {
                "premise": "It rained. ",
                "choice1": "I got wet.",
                "choice2": "It was.",
                "question": "effect",
                "label": 1,
            },
            {"premise": "I slept!", "choice1": "a bed.", "choice2": "I", "question": "cause", "label": 0},
        ],
    ),
    "wic": (
        "wic",
        [
            {
                "word": "bank",
                "sentence1": "The banks rose.",
                "sentence2": "A bank.",
                "start1": 4,
                "end1": 9,
                "label": 0,
            },
            {
                "word": "run",
                "sentence1": "Run!",
                "sentence2": "He's run.",
                "start1": 0,
                "end1": 3,
                "label": 1,
            },
        ],
    ),
    "wsc": (
        "wsc",
        [
            {
                "text": WSC_TEXT,
                "span1_text": "Bob",
                "span2_text": pronoun,
                "span2_index": index,
                "label": label,
            }
            for pronoun, index, label in (("she", 6, 0), ("he", 16, 1), ("Ann", 0, 0))
        ],
    ),
    "multirc_harness": (
        "multirc",
        [
            {"paragraph": "Ann ate.", "question": "Who ate?", "answer": "Ann's dog", "label": 0},
            {"paragraph": "Ann ate. ", "question": "Who?", "answer": "Ann ", "label": 1},
        ],
    ),
    "race_harness": (
        "race",
        [
            {
                "article": "Long ago.\nStill.",
                "problems": repr(
                    [
                        {"question": "Who?", "answer": "C", "options": ["a.", "b", "c 'x'", "d"]},
                        {"question": "He went  _  .", "answer": "A", "options": ["home.", "b", "c", "d"]},
                        {"question": "It was _ .", "answer": "B", "options": ["a", "gone", "c", "d"]},
                        {"question": last, "answer": "D", "options": ["a", "b b", "c", "d."]},
                    ]
                ),
            }
            for last in ("Which one?", "The best title is  _  . ", "He had  _  .")
        ],
    ),
}


def records(values: list[dict[str, Any]]) -> list[Record]:
    return [Record(row, f"rows.jsonl:{number}") for number, row in enumerate(values, start=1)]


def items(name: str, *values: dict[str, Any]) -> list[Any]:
    return list(items_of(STANDARD[name], records(list(values))))


@pytest.fixture(scope="module")
def task_manager():
    pytest.importorskip("lm_eval")
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_path=[str(folder / "super_glue"), str(folder / "race")], include_defaults=False
    )


@pytest.mark.parametrize("name", HUB_RECORDS)
def test_asks_in_the_words_of_lm_eval(name, task_manager, monkeypatch):
    """Its own task, on these records: contexts, continuations and right answers."""
    import datasets

    theirs, values = HUB_RECORDS[name]
    rows = datasets.Dataset.from_list(values)
    loaded = []

    def load_dataset(path, name, **_):
        loaded.append((path, name))
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = task_manager.load(theirs)["tasks"][theirs]
    task.build_all_requests(rank=0, world_size=1)
    ours = items(name, *values)

    requests = iter(task.instances)
    for item, document in zip(ours, values, strict=True):
        pairs = [next(requests).args for _ in item.choices]
        assert [context + continuation for context, continuation in pairs] == [
            item.prompt + choice for choice in item.choices
        ]
        assert {context.rstrip(" ") for context, _ in pairs} == {item.prompt}
        for position in range(len(pairs)):
            likeliest = [(-float(i != position), False) for i in range(len(pairs))]
            assert task.process_results(document, likeliest)["acc"] == (position == item.label)
    assert next(requests, None) is None
    assert loaded == [(STANDARD[name].hub, STANDARD[name].subset)]
    assert STANDARD[name].metric == "acc"


def test_every_task_of_the_harness_is_compared():
    shared = {name for name, task in STANDARD.items() if "super_glue" in task.hub} | {"race_harness"}
    assert set(HUB_RECORDS) == shared - {"multirc"}


def test_multirc_counts_a_right_answer_as_right():
    (_, values) = HUB_RECORDS["multirc_harness"]
    ours, theirs = items("multirc", *values), items("multirc_harness", *values)
    assert [(item.prompt, item.choices) for item in ours] == [(item.prompt, item.choices) for item in theirs]
    assert [item.choices[item.label].split()[-1] for item in ours] == ["no", "yes"]
    assert items("multirc", {**values[1], "label": True})[0].label == 0


def test_multirc_of_the_original_files():
    answers = [{"text": "Ann", "label": 1, "idx": 0}, {"text": "Bob", "label": 0, "idx": 1}]
    questions = [{"question": "Who ate?", "answers": answers}, {"question": "Who?", "answers": answers[:1]}]
    nested = {"idx": 0, "passage": {"text": "Ann ate.", "questions": questions}}
    flat = [
        {"paragraph": "Ann ate.", "question": question["question"], "answer": text, "label": label}
        for question in questions
        for text, label in ((answer["text"], answer["label"]) for answer in question["answers"])
    ]
    found = items("multirc", nested)
    assert [item.id for item in found] == ["0-0", "0-1", "0-2"]
    assert [replace(item, id="") for item in found] == [
        replace(item, id="") for item in items("multirc", *flat)
    ]
    without = {"passage": {"text": "Ann ate.", "questions": [{"question": "Who?", "answers": []}]}}
    with pytest.raises(DataError, match=r"rows.jsonl:1, question 1: field .answers. must be a list of obj"):
        items("multirc", without)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("boolq", [False, True]),
        ("wic", [False, True]),
        ("wsc", [False, True]),
        ("rte", ["entailment", "not_entailment"]),
        ("cb", ["entailment", "contradiction", "neutral"]),
    ],
)
def test_labels_as_in_the_original_files(name, labels):
    first = HUB_RECORDS[name][1][0]
    assert [item.label for item in items(name, *({**first, "label": label} for label in labels))] == [
        *range(len(labels))
    ]


def test_wsc_with_spans_in_an_object_of_their_own():
    (flat, *_) = HUB_RECORDS["wsc"][1]
    names = ("span1_text", "span2_text", "span2_index")
    nested = {"text": flat["text"], "label": False, "target": {name: flat[name] for name in names}}
    assert items("wsc", nested) == items("wsc", flat)


RACE = {"article": "Long ago.", "question": "Who?", "options": ["a", "b", "c", "d"], "answer": "C"}


def test_race_by_question():
    assert items("race", RACE) == [
        ChoiceItem("0", "Article: Long ago.\n\nQuestion: Who?\nAnswer:", (" a", " b", " c", " d"), 2)
    ]


def test_published_labels_count_as_they_do_whatever_the_options_say():
    (item, *_) = items("race", {**RACE, "options": ["Plan B", "Plan C", "Plan A", "D"], "answer": "C"})
    assert item.label == 2
    article = {"article": "x", "question": "Why?", "options": ["2 days", "1 day", "3 days", "4 days"]}
    (item,) = items("quality", {**article, "answer": 1})
    assert item.label == 1


def test_race_with_problems_as_a_list():
    asked = {"article": "Long ago.", "problems": [{**RACE, "answer": "B"}]}
    assert items("race_harness", asked) == [
        ChoiceItem("0", "Article: Long ago.\n\nWho?", (" a", " b", " c", " d"), 1)
    ]


NARRATIVE = GenerationItem("0", "Once.\n\nQuestion: When?\nAnswer:", ("once", "Once."), 64, ("\n",))


def test_narrativeqa_of_files_and_of_the_hub():
    flat = {"passage": "Once.", "question": "When?", "answer": ["once", "Once."]}
    hub = {
        "document": {"text": "Once upon a time.", "summary": {"text": "Once."}},
        "question": {"text": "When?"},
        "answers": [{"text": "once"}, {"text": "Once."}],
    }
    assert items("narrativeqa", flat, hub)[0] == NARRATIVE
    assert items("narrativeqa", hub) == [NARRATIVE]
    assert items("narrativeqa_story", hub)[0].prompt.startswith("Once upon a time.\n\nQuestion: When?")
    assert STANDARD["narrativeqa"].score(NARRATIVE, GenerationAnswer("the once")) == {
        "f1": 1.0,
        "exact_match": 1.0,
        "rouge_l": pytest.approx(2 / 3),
    }


MEETING = {
    "meeting_transcripts": [{"speaker": "Ann", "content": "Hi ."}, {"speaker": "Bob", "content": "Bye ."}],
    "general_query_list": [{"query": "Sum up.", "answer": "They met."}],
    "specific_query_list": [{"query": "Who?", "answer": "Two.", "relevant_text_span": [["0", "1"]]}],
}


def test_qmsum_asks_every_query():
    prompt = "Ann: Hi .\nBob: Bye .\n\nQuestion: {}\nAnswer:"
    assert items("qmsum", MEETING) == [
        GenerationItem("0-0", prompt.format("Sum up."), ("They met.",), 256, ("\n",)),
        GenerationItem("0-1", prompt.format("Who?"), ("Two.",), 256, ("\n",)),
    ]
    assert items("qmsum", {"context": "Hi.", "question": "Who?", "answers": ["Ann."]}) == [
        GenerationItem("0", "Hi.\n\nQuestion: Who?\nAnswer:", ("Ann.",), 256, ("\n",))
    ]


QUALITY = ChoiceItem("0", "Far away.\n\nQuestion: Where?\nAnswer:", (" here", " there"), 1)


def test_quality_of_files_and_of_the_hub():
    asked = {"question": "Where?", "options": ["here", "there"]}
    assert items("quality", {"article": "Far away.", **asked, "answer": 1}) == [QUALITY]
    assert items("quality", {"article": "Far away.", "questions": [{**asked, "gold_label": 2}]}) == [QUALITY]


@pytest.mark.parametrize(
    ("name", "good", "change", "message"),
    [
        ("boolq", None, {"label": "true"}, r"rows.jsonl:2: field 'label' holds 'true'"),
        ("boolq", None, {"passage": None}, r"rows.jsonl:2: field 'passage' is null"),
        ("cb", None, {"label": "maybe"}, r"rows.jsonl:2: .* 'entailment', 'contradiction', 'neutral', '0'"),
        ("cb", None, {"label": -1}, r"rows.jsonl:2: .*take another split"),
        ("copa", None, {"question": "why"}, r"rows.jsonl:2: .* 'why'; allowed: cause or effect"),
        ("copa", None, {"choice2": ""}, r"rows.jsonl:2: choice 2 of 2 is empty"),
        ("wic", None, {"start1": "4"}, r"rows.jsonl:2: field 'start1' holds '4' where a whole number"),
        ("wsc", None, {"span2_index": True}, r"rows.jsonl:2: field 'span2_index' holds True"),
        ("race", RACE, {"options": ["a", "b"]}, r"rows.jsonl:2: .* 'C', .* makes it position 2"),
        ("race_harness", None, {"problems": "[{"}, r"rows.jsonl:2: field 'problems' is not the text"),
        ("race_harness", None, {"problems": []}, r"rows.jsonl:2: field 'problems' must be a list of obj"),
        (
            "race_harness",
            None,
            {"problems": [{**RACE, "answer": "AB"}, RACE]},
            r"rows.jsonl:2, question 1: field 'answer' holds 'AB', which is none of its 4 choices",
        ),
        ("qmsum", MEETING, {"meeting_transcripts": []}, r"rows.jsonl:2: field 'meeting_transcripts' must"),
        ("qmsum", MEETING, {"general_query_list": ["why"]}, r"rows.jsonl:2: field 'queries' must be"),
        (
            "qmsum",
            MEETING,
            {"general_query_list": [{"query": "why"}]},
            r"rows.jsonl:2, query 1: the record has no field 'answer' for 'references'",
        ),
    ],
)
def test_records_that_do_not_fit(name, good, change, message):
    good = good or HUB_RECORDS[name][1][0]
    failed = [item for item in items(name, good, {**good, **change}) if isinstance(item, FailedItem)]
    assert len(failed) == 1
    with pytest.raises(DataError, match=f"^{message}"):
        raise DataError(failed[0].error)


def test_records_of_another_task():
    with pytest.raises(DataError, match=r"records of the task 'boolq': none of 1 can be used; .* 'passage'"):
        items("boolq", RACE)


def test_limit_and_names():
    rows = records([MEETING, MEETING])
    assert [item.id for item in items_of(STANDARD["qmsum"], rows, limit=3)] == ["0-0", "0-1", "1-0"]
    assert all(name == task.name for name, task in STANDARD.items())
