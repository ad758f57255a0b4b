"""Tasks from their sections: known ones by name, with settings, and a user's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.schema import RunConfig, TaskSection
from ssmlora_dist.config.tasks import (
    KNOWN,
    OWN,
    WITH_SETTINGS,
    build_task,
    build_tasks,
    output_directory,
    surplus_keys,
)
from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.items import (
    ChoiceAnswer,
    ChoiceItem,
    FailedItem,
    GenerationAnswer,
    GenerationItem,
    Task,
)
from ssmlora_dist.models.tokenizer import load_tokenizer

from .conftest import changed

SEED = 3
STORY = "1 Mary went to the hall.\n2 John went to the park.\n3 Where is Mary?\thall\t1\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("bytes")


def section(**settings: Any) -> TaskSection:
    return TaskSection.model_validate(settings)


def config(*tasks: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(changed(("run.seed", SEED), ("evaluation", {"tasks": list(tasks)})))


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def items_of(task: Task) -> list[Any]:
    return list(task.items())


# A length that holds them in bytes, and whether they have depths.
GENERATED = {
    "passkey": (256, True),
    "niah_single_1": (512, True),
    "niah_multikey_2": (512, True),
    "variable_tracking": (2048, False),
    "common_words": (8192, False),
    "frequent_words": (1024, False),
}


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_task_has_the_lengths_and_depths_asked_for(name: str, tokenizer: Any) -> None:
    length, is_deep = GENERATED[name]
    settings: dict[str, Any] = {"depths": [0.25, 0.75]} if is_deep else {}
    task = build_task(section(task=name, lengths=[length], num_examples=4, **settings), tokenizer, SEED)
    items = items_of(task)
    assert (task.name, task.metric) == (name, "string_match_all")
    assert [item.metadata["length"] for item in items] == [length] * 4
    if is_deep:
        assert [item.metadata["depth"] for item in items] == [0.25, 0.75, 0.25, 0.75]
    for item in items:
        assert isinstance(item, GenerationItem)
        num_tokens = len(tokenizer(item.prompt)["input_ids"]) + item.max_new_tokens
        assert 0.9 * length <= num_tokens <= length
    assert items == items_of(task), "the same every time"
    other = build_task(section(task=name, lengths=[length], num_examples=4), tokenizer, SEED + 1)
    assert [item.references for item in items_of(other)] != [item.references for item in items]


def test_defaults_of_a_generated_task(tokenizer: Any) -> None:
    items = items_of(build_task(section(task="passkey"), tokenizer, SEED))
    assert {item.metadata["length"] for item in items} == {1024}
    assert len(items) == 100
    assert {item.metadata["depth"] for item in items} == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_facts_are_hidden_in_the_background_given(tmp_path: Path, tokenizer: Any) -> None:
    files = [tmp_path / "one.txt", tmp_path / "two.jsonl"]
    files[0].write_text("Herons wade. " * 30)
    write_rows(files[1], [{"text": "Otters dive. " * 30}])
    task = section(task="passkey", lengths=[600], num_examples=2, background=list(map(str, files)))
    prompts = [item.prompt for item in items_of(build_task(task, tokenizer, SEED))]
    assert all("Herons wade." in prompt or "Otters dive." in prompt for prompt in prompts)
    write_rows(files[1], [{"txt": "Otters dive."}])
    with pytest.raises(DataError, match=r"two.jsonl:1: the record has no field 'text' .nearest: txt"):
        items_of(build_task(task, tokenizer, SEED))


def test_babilong_takes_its_questions_from_the_file(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "qa1.txt").write_text(STORY)
    task = build_task(
        section(task="babilong_qa1", path=str(tmp_path / "qa1.txt"), lengths=[512], num_examples=1),
        tokenizer,
        SEED,
    )
    [item] = items_of(task)
    assert (task.metric, item.references, item.metadata["question"]) == (
        "babilong",
        ("hall",),
        "Where is Mary?",
    )
    assert task.score(item, GenerationAnswer("in the hall")) == {"babilong": 0.0}, "hall is no label of qa1"


def test_a_published_task_reads_files_in_place_of_the_hub(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"passage": "Ice melts.", "question": "does ice melt", "label": label} for label in (1, 0, "true")
    ]
    task = build_task(
        section(task="boolq", name="mine", path=write_rows(tmp_path / "rows.jsonl", rows), num_examples=3),
        tokenizer,
        SEED,
    )
    first, second, failed = items_of(task)
    assert (task.name, task.metric) == ("mine", "acc")
    assert first.prompt == "Ice melts.\nQuestion: does ice melt?\nAnswer:"
    assert [first.label, second.label] == [1, 0]
    assert isinstance(failed, FailedItem)
    assert "rows.jsonl:3: field 'label' holds 'true'" in failed.error
    limited = build_task(
        section(task="boolq", path=str(tmp_path / "rows.jsonl"), num_examples=2), tokenizer, SEED
    )
    assert len(items_of(limited)) == 2


def test_an_own_multiple_choice_task(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"q": "Sky?", "right": "y", "c": ["red", "blue"]},
        {"q": "Sea?", "right": "n", "c": ["wet", "dry"]},
    ]
    settings = {
        "path": write_rows(tmp_path / "rows.jsonl", rows),
        "prompt": "Q: {q}\nA:",
        "fields": {"label": "right", "choices": "c"},
        "labels": {"n": 0, "y": 1},
    }
    task = build_task(section(task="multiple_choice", name="colours", **settings), tokenizer, SEED)
    first, second = items_of(task)
    assert first == ChoiceItem("0", "Q: Sky?\nA:", (" red", " blue"), 1)
    assert (second.choices, second.label) == ((" wet", " dry"), 0)
    assert (task.name, task.metric) == ("colours", "acc")
    assert task.score(first, ChoiceAnswer((-2.0, -1.0))) == {"acc": 1.0, "acc_norm": 1.0}


def test_an_own_multiple_choice_task_with_templates(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "Sky?", "a": "red", "label": "B"}])
    task = build_task(
        section(task="multiple_choice", path=path, choices=[" {a}", " not {a}"]), tokenizer, SEED
    )
    [item] = items_of(task)
    assert item == ChoiceItem("0", "Question: Sky?\nAnswer:", (" red", " not red"), 1)


def test_an_own_generation_task(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"question": "Capital?", "answers": ["Paris", "paris"]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"path": path, "fields": {"references": "answers"}}
    task = build_task(section(task="generation", **settings), tokenizer, SEED)
    [item] = items_of(task)
    assert (item.references, item.max_new_tokens, item.stop) == (("Paris", "paris"), 64, ("\n",))
    assert task.metric == "f1"
    assert task.score(item, GenerationAnswer("Paris!")) == {"f1": 1.0, "exact_match": 1.0}
    settings |= {"metrics": ["string_match_part"], "max_new_tokens": 5, "stop": []}
    task = build_task(section(task="generation", **settings), tokenizer, SEED)
    [item] = items_of(task)
    assert (item.max_new_tokens, item.stop, task.metric) == (5, (), "string_match_part")
    assert task.score(item, GenerationAnswer("It is Paris.")) == {"string_match_part": 1.0}


def test_records_of_which_none_can_be_used(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [{"question": "Sky?", "choices": ["a", "b"], "label": "true"}] * 2
    )
    with pytest.raises(DataError) as caught:
        items_of(build_task(section(task="multiple_choice", name="sky", path=path), tokenizer, SEED))
    message = str(caught.value)
    assert message.startswith("records of the task 'sky': none of 2 can be used; the first: ")
    assert "rows.jsonl:1: field 'label' holds 'true'" in message
    assert "set `labels` to what its labels mean" in message


def names_of(tasks: Sequence[Task]) -> list[str]:
    return [task.name for task in tasks]


def test_all_of_the_section_or_those_named_in_their_order(tokenizer: Any) -> None:
    with_tasks = config({"task": "passkey", "name": "keys"}, {"task": "common_words"})
    assert names_of(build_tasks(with_tasks, tokenizer)) == ["keys", "common_words"]
    named = ["frequent_words", "keys", "passkey", "keys"]
    assert names_of(build_tasks(with_tasks, tokenizer, named)) == ["frequent_words", "keys", "passkey"]


def test_every_known_task_is_built_by_its_name(tokenizer: Any) -> None:
    for name in set(KNOWN) - set(WITH_SETTINGS):
        assert names_of(build_tasks(config(), tokenizer, [name])) == [name]


def test_the_seed_of_the_run_draws_the_items(tokenizer: Any) -> None:
    settings = {"lengths": [256], "num_examples": 2}
    [task] = build_tasks(config({"task": "passkey", **settings}), tokenizer)
    assert items_of(task) == items_of(build_task(section(task="passkey", **settings), tokenizer, SEED))


def test_lengths_take_the_place_of_those_configured(tokenizer: Any) -> None:
    with_tasks = config({"task": "passkey", "lengths": [512], "num_examples": 2}, {"task": "boolq"})
    passkey, _ = build_tasks(with_tasks, tokenizer, lengths=[256, 320])
    assert [item.metadata["length"] for item in items_of(passkey)] == [256, 320, 256, 320]


@pytest.mark.parametrize(
    ("names", "lengths", "message"),
    [
        (
            ["pass_key"],
            [],
            r"--tasks pass_key: no task of evaluation.tasks and none that is known .nearest: passkey",
        ),
        (["kys"], [], r"--tasks kys: .* .nearest: keys.; known are: keys, passkey, niah_single_1, "),
        (["generation"], [], r"--tasks generation: needs settings, .* add it to evaluation.tasks"),
        (["babilong_qa1"], [], r"--tasks babilong_qa1: needs settings, its path among them"),
        (["boolq", "rte"], [512], r"--lengths: no task is generated, .*; leave it out"),
    ],
)
def test_what_cannot_be_named(names: list[str], lengths: list[int], message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        build_tasks(config({"task": "passkey", "name": "keys"}), tokenizer, names, lengths)


def test_nothing_to_evaluate(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"nothing to evaluate: .* or with --tasks; known are: passkey, "
    ) as caught:
        build_tasks(config(), tokenizer)
    assert not any(name in str(caught.value).split() for name in OWN)


def test_lengths_that_a_task_cannot_have(tokenizer: Any) -> None:
    for lengths, message in (([64], r"use at least \d+$"), ([256, 256], "each once$")):
        asked = section(task="niah_single_1", name="mine", lengths=lengths)
        with pytest.raises(DataError, match=f"^task 'mine': needles: .*{message}"):
            items_of(build_task(asked, tokenizer, SEED))


def test_settings_that_do_not_belong() -> None:
    given = section(task="boolq", depths=[0.5], lengths=[64], prompt="{q}", split="test", num_examples=3)
    assert sorted(surplus_keys(given)) == ["depths", "lengths", "prompt"]
    assert surplus_keys(section(task="generation", path="a.jsonl", metrics=["f1"], name="x")) == []
    assert surplus_keys(section(task="multiple_choice", path="a.jsonl", metrics=["f1"])) == ["metrics"]


@pytest.mark.parametrize(
    ("adapter", "directory"),
    [
        ("runs/a/adapter", "runs/a/evaluation"),
        ("runs/b/../a/adapter", "runs/a/evaluation"),
        ("runs/a/checkpoints/step-00000100", "runs/a/evaluation-step-00000100"),
        ("runs/a/checkpoints/step-00000200", "runs/a/evaluation-step-00000200"),
        ("runs/a/newest", "runs/a/evaluation-step-00000200"),
        ("adapters/first", "adapters/first-evaluation"),
        ("adapters/second/", "adapters/second-evaluation"),
    ],
)
def test_every_adapter_has_a_directory_of_its_own(
    adapter: str, directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "newest").symlink_to("checkpoints/step-00000200")
    monkeypatch.chdir(tmp_path)
    assert output_directory(config(), Path(adapter)) == Path(directory)
    absolute = output_directory(config(), tmp_path / adapter)
    assert absolute == (tmp_path / directory).resolve()


def test_an_adapter_named_from_within_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    monkeypatch.chdir(checkpoint)
    assert output_directory(config(), Path()) == Path("../../evaluation-step-00000100")
    monkeypatch.chdir(checkpoint.parent)
    assert output_directory(config(), Path(checkpoint.name)) == Path("../evaluation-step-00000100")


def test_every_base_model_alone_has_a_directory_of_its_own() -> None:
    def directory_of(path: str | None) -> Path:
        model = config().model.model_copy(update={"path": path})
        return output_directory(config().model_copy(update={"model": model}), None)

    runs = config().run.output_dir
    assert directory_of("models/SmolLM2") == runs / "test-SmolLM2-evaluation"
    assert directory_of("first/merged/") == runs / "test-merged-evaluation"
    assert directory_of("organisation/model") == runs / "test-model-evaluation"
    assert directory_of(None) == runs / "test-evaluation"
