"""The runner: rows of every kind, batches, resuming after any interruption, memory that runs out."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmlora_dist.errors import CheckpointError, DataError
from ssmlora_dist.evaluation import runner
from ssmlora_dist.evaluation.item_rows import PARTS_DIRECTORY, RESULTS_FILE
from ssmlora_dist.evaluation.items import ChoiceItem, FailedItem, GenerationItem, Task
from ssmlora_dist.models.loss import checkpoint_layers
from ssmlora_dist.models.tokenizer import load_tokenizer
from ssmlora_dist.progress import Work, shown_by
from tests.tiny import QV_AND_MLP, SEED, adapted_model, tiny_model
from tests.told import Told

# As in test_choices.py.
TOLERANCE = 1e-4
VOCAB_SIZE = 259
BUDGET = 120


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted_model(vocab_size=VOCAB_SIZE)


def accuracy(item: Any, answer: Any) -> Mapping[str, float]:
    values = answer.log_likelihoods
    return {"acc": float(values.index(max(values)) == item.label)}


def length_of_text(item: Any, answer: Any) -> Mapping[str, float]:
    return {"length": min(1.0, len(answer.text) / 10)}


def text(draw: random.Random, length: int) -> str:
    return "".join(draw.choice("abcdefgh ") for _ in range(length)).strip() or "a"


def choice_items(num_items: int) -> list[ChoiceItem]:
    draw = random.Random(SEED)
    return [
        ChoiceItem(
            f"c{i}",
            text(draw, draw.randrange(3, 40)),
            tuple(f" {text(draw, draw.randrange(1, 6))}" for _ in range(draw.randrange(2, 5))),
            0,
            {"length": i, "depth": 0.5},
        )
        for i in range(num_items)
    ]


def generation_items(num_items: int) -> list[GenerationItem]:
    draw = random.Random(SEED)
    return [
        GenerationItem(f"g{i}", text(draw, draw.randrange(3, 40)), ("ü", "b"), draw.randrange(2, 9), ("e",))
        for i in range(num_items)
    ]


def task_of(name: str, items: Sequence[Any], score: Any = accuracy) -> Task:
    return Task(name, lambda: iter(items), score, "acc")


def two_tasks(num_items: int = 14) -> list[Task]:
    choices = [*choice_items(num_items), FailedItem("f0", "line 3: no label")]
    return [
        task_of("choices", choices),
        task_of("answers", generation_items(num_items), length_of_text),
    ]


def test_rows_are_what_was_asked_and_answered(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    tasks = two_tasks()
    rows = runner.run(tasks, model, tokenizer, max_batch_tokens=BUDGET, directory=tmp_path / "out")
    order = [(task.name, item.id) for task in tasks for item in task.items()]
    assert [(row["task"], row["id"]) for row in rows] == order
    by_id = {row["id"]: row for row in rows}
    assert by_id["f0"] == {"task": "choices", "id": "f0", "metadata": {}, "error": "line 3: no label"}
    item, row = choice_items(14)[3], by_id["c3"]
    assert set(row) == {"task", "id", "metadata", "prediction", "label", "log_likelihoods", "scores"}
    assert row["metadata"] == {"length": 3, "depth": 0.5}
    assert len(row["log_likelihoods"]) == len(item.choices)
    assert row["prediction"] == row["log_likelihoods"].index(max(row["log_likelihoods"]))
    assert row["scores"] == {"acc": float(row["prediction"] == row["label"])}
    row = by_id["g2"]
    assert set(row) == {"task", "id", "metadata", "prediction", "references", "scores"}
    assert row["references"] == ["ü", "b"]
    assert row["scores"] == {"length": min(1.0, len(row["prediction"]) / 10)}
    written = (tmp_path / "out" / RESULTS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in written] == rows


@pytest.mark.parametrize("budget", [1, 60, 1000])
def test_nothing_depends_on_the_batches_or_the_order(model: Any, tokenizer: Any, budget: int) -> None:
    wanted = runner.run(two_tasks(), model, tokenizer, max_batch_tokens=BUDGET)
    shuffled = two_tasks()
    items = [random.Random(budget).sample(list(task.items()), len(list(task.items()))) for task in shuffled]
    tasks = [task_of(t.name, i, t.score) for t, i in zip(shuffled, items, strict=True)][::-1]
    by_key = {(r["task"], r["id"]): r for r in runner.run(tasks, model, tokenizer, max_batch_tokens=budget)}
    for row in wanted:
        got = by_key[row["task"], row["id"]]
        values = zip(got.pop("log_likelihoods", []), row.pop("log_likelihoods", []), strict=True)
        assert all(abs(a - b) <= TOLERANCE for a, b in values)
        assert got == row


def test_one_item_s_error_is_a_row_of_its_own(model: Any, tokenizer: Any) -> None:
    def score(item: Any, answer: Any) -> Mapping[str, float]:
        if item.id == "c1":
            raise KeyError("label")
        return {"acc": float("nan") if item.id == "c2" else 1.0}

    items = [
        *choice_items(4),
        ChoiceItem("long", "x" * 70, (" a", " b"), 0),
        ChoiceItem("empty", "x", ("", " b"), 0),
        ChoiceItem("none", None, (" a", " b"), 0),  # type: ignore[arg-type]
    ]
    task = task_of("t", items, score)
    rows = runner.run([task], model, tokenizer, max_batch_tokens=BUDGET, max_length=64)
    errors = {row["id"]: row["error"] for row in rows if "error" in row}
    assert errors == {
        "c1": "KeyError: 'label'",
        "c2": "ValueError: scores are not finite: {'acc': nan}",
        "long": (
            "the prompt and its longest choice are 71 tokens; the model takes 64: "
            "shorten the item, choose a model that takes more or, where it has a RoPE, "
            "set model.rope_parameters"
        ),
        "empty": "the choice '' adds no token to the prompt; give it a text",
        "none": "TypeError: object of type 'NoneType' has no len()",
    }
    assert all(("scores" in row) == (row["id"] not in errors) for row in rows)
    assert "log_likelihoods" in rows[1], "the answer is kept where only its score failed"


def test_logits_that_are_no_numbers_are_errors(tokenizer: Any) -> None:
    model = tiny_model(vocab_size=VOCAB_SIZE)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * torch.nan)
    rows = runner.run(two_tasks(2), model, tokenizer, max_batch_tokens=BUDGET)
    found = [row["error"] for row in rows]
    assert found[0].startswith("log-likelihoods are not finite: (nan, nan")
    assert found[3:] == ["a logit is not a number"] * 2


def test_between_training_steps_it_is_the_same_and_the_mode_is_put_back(model: Any, tokenizer: Any) -> None:
    trained = adapted_model(
        vocab_size=VOCAB_SIZE, config=QV_AND_MLP.model_copy(update={"dropout": 0.5})
    ).train()
    checkpoint_layers(trained)
    rows = runner.run(two_tasks(4), trained, tokenizer, max_batch_tokens=BUDGET)
    assert rows == runner.run(two_tasks(4), model, tokenizer, max_batch_tokens=BUDGET)
    assert trained.training
    assert all(parameter.grad is None for parameter in trained.parameters())


def run_until(
    stop_after: int, tasks: Sequence[Task], model: Any, tokenizer: Any, directory: Path, **sharing: Any
) -> None:
    """A run that is interrupted once so many batches are done; of one of several ranks, others idle."""
    told, names = [0], [task.name for task in tasks]

    def interrupt(work: Work, done: int) -> None:
        told[0] += work.description in names
        if told[0] == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), shown_by(Told(interrupt)):
        runner.run(
            tasks,
            model,
            tokenizer,
            max_batch_tokens=BUDGET,
            directory=directory,
            **sharing,
        )


def results_of(directory: Path) -> bytes:
    return (directory / RESULTS_FILE).read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The result file of a run in one go, and its number of batches."""
    directory = tmp_path_factory.mktemp("whole")
    told = Told()
    with shown_by(told):
        runner.run(two_tasks(), model, tokenizer, max_batch_tokens=BUDGET, directory=directory)
    return results_of(directory), len(batches_of(told))


def batches_of(told: Told) -> list[tuple[str, int, int | None]]:
    """The updates about batches that were computed."""
    return [update for update in told.updates if update[0] in ("choices", "answers")]


def test_interrupted_anywhere_and_resumed_the_file_is_the_same(
    model: Any, tokenizer: Any, tmp_path: Path, uninterrupted: tuple[bytes, int]
) -> None:
    whole, num_batches = uninterrupted
    assert num_batches > 6
    for stop_after in range(1, num_batches, 2):
        directory = tmp_path / str(stop_after)
        run_until(stop_after, two_tasks(), model, tokenizer, directory)
        assert not (directory / RESULTS_FILE).exists()
        told = Told()
        with shown_by(told):
            runner.run(two_tasks(), model, tokenizer, max_batch_tokens=BUDGET, directory=directory)
        assert results_of(directory) == whole
        assert len(batches_of(told)) == num_batches - stop_after, "batches that were done are done again"


def test_half_a_line_is_dropped_and_its_batch_computed_again(
    model: Any, tokenizer: Any, tmp_path: Path, uninterrupted: tuple[bytes, int]
) -> None:
    run_until(8, two_tasks(), model, tokenizer, tmp_path)
    [part] = (tmp_path / PARTS_DIRECTORY).iterdir()
    content = part.read_bytes()
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    print(f"seed {SEED}")
    for cut in [0, 1, ends[0], ends[-2], ends[-2] + 1, *random.Random(SEED).sample(range(len(content)), 6)]:
        (tmp_path / RESULTS_FILE).unlink(missing_ok=True)
        part.write_bytes(content[:cut])
        runner.run(two_tasks(), model, tokenizer, max_batch_tokens=BUDGET, directory=tmp_path)
        assert results_of(tmp_path) == uninterrupted[0], f"cut at {cut}"
        assert all(json.loads(line) for line in part.read_text().splitlines())


def on_ranks(size: int, start: Callable[..., Any]) -> list[Any]:
    """What `start(rank=..., size=..., gather=...)` gives on ranks that are threads."""
    barrier = threading.Barrier(size, timeout=60)
    values: list[Any] = [None] * size

    def on_rank(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        return start(rank=rank, size=size, gather=gather)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(on_rank, range(size)))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (3, 2), (1, 4)])
def test_resumed_on_another_number_of_ranks_the_file_is_the_same(
    tokenizer: Any, tmp_path: Path, uninterrupted: tuple[bytes, int], before: int, after: int
) -> None:
    # A model each, as ranks have.
    models = [adapted_model(vocab_size=VOCAB_SIZE) for _ in range(4)]
    on_ranks(
        before,
        lambda rank, **sharing: run_until(
            2, two_tasks(), models[rank], tokenizer, tmp_path, rank=rank, **sharing
        ),
    )
    assert len(list((tmp_path / PARTS_DIRECTORY).iterdir())) == before
    found = on_ranks(
        after,
        lambda rank, **sharing: runner.run(
            two_tasks(),
            models[rank],
            tokenizer,
            max_batch_tokens=BUDGET,
            directory=tmp_path,
            rank=rank,
            **sharing,
        ),
    )
    assert results_of(tmp_path) == uninterrupted[0]
    assert all(rows == found[0] for rows in found), "every rank has all rows"
    parts = (tmp_path / PARTS_DIRECTORY).iterdir()
    rows = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    keys = [(row["task"], row["id"]) for row in rows]
    assert len(keys) == len(set(keys)) == 28, "each item is computed once"


def test_tasks_of_one_batch_are_shared_by_the_ranks(tokenizer: Any, tmp_path: Path) -> None:
    tasks = [task_of(f"t{number}", choice_items(3)) for number in range(4)]
    models = [adapted_model(vocab_size=VOCAB_SIZE) for _ in range(2)]
    found = on_ranks(
        2,
        lambda rank, **sharing: runner.run(
            tasks,
            models[rank],
            tokenizer,
            max_batch_tokens=10_000,
            directory=tmp_path,
            rank=rank,
            **sharing,
        ),
    )
    parts = sorted((tmp_path / PARTS_DIRECTORY).iterdir())
    shares = [{json.loads(line)["task"] for line in part.read_text().splitlines()} for part in parts]
    assert shares == [{"t0", "t2"}, {"t1", "t3"}]
    assert found[0] == found[1] == runner.run(tasks, models[0], tokenizer, max_batch_tokens=10_000)


def test_what_failed_is_tried_again(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    scored: list[str] = []

    def start(broken: str | None) -> list[Any]:
        def score(item: Any, answer: Any) -> Mapping[str, float]:
            scored.append(item.id)
            if item.id == broken:
                raise KeyError("label")
            return accuracy(item, answer)

        items = [task_of("t", choice_items(5), score)]
        return runner.run(items, model, tokenizer, max_batch_tokens=BUDGET, directory=tmp_path)

    first = start("c2")
    assert [row["id"] for row in first if "error" in row] == ["c2"]
    scored.clear()
    second = start(None)
    assert scored == ["c2"], "the others are not done again"
    assert second == runner.run([task_of("t", choice_items(5))], model, tokenizer, max_batch_tokens=BUDGET)


def test_rows_of_another_evaluation_are_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    def start(tasks: list[Task], digest: str) -> None:
        digests = {task.name: digest for task in tasks}
        runner.run(tasks, model, tokenizer, max_batch_tokens=BUDGET, directory=tmp_path, digests=digests)

    tasks = two_tasks(3)
    start(tasks, "adapter 1")
    before = results_of(tmp_path)
    refused = "rows of task 'choices' for another model, adapter or setting .item 'c0' differs"
    with pytest.raises(CheckpointError, match=refused):
        start(tasks, "adapter 2")
    changed = [ChoiceItem("c0", "another prompt", (" a", " b"), 1), *choice_items(3)[1:]]
    with pytest.raises(CheckpointError, match=refused):
        start([task_of("choices", changed)], "adapter 1")
    assert results_of(tmp_path) == before
    # Another task beside them is none of their business.
    start([*tasks, task_of("more", choice_items(2))], "adapter 1")
    assert results_of(tmp_path).startswith(before)


def test_a_file_that_is_no_file_of_rows_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    run_until(3, two_tasks(), model, tokenizer, tmp_path)
    [part] = (tmp_path / PARTS_DIRECTORY).iterdir()
    lines = part.read_bytes().splitlines(keepends=True)
    for line in (b"\0\0\0\n", b"{}\n", b"3\n", b"\n"):
        part.write_bytes(b"".join([lines[0], line, *lines[1:]]))
        with pytest.raises(CheckpointError, match=r"rank-0.jsonl:2: is no row of an evaluation; remove"):
            runner.run(two_tasks(), model, tokenizer, max_batch_tokens=BUDGET, directory=tmp_path)


def test_a_directory_that_cannot_be_written(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="choose another output directory"):
        runner.run(two_tasks(), model, tokenizer, max_batch_tokens=BUDGET, directory=tmp_path / "file")


def test_names_and_ids_must_differ(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="two tasks are called 'a'"):
        runner.run([task_of("a", []), task_of("a", [])], model, tokenizer, max_batch_tokens=BUDGET)
    items = [*choice_items(2), FailedItem("c1", "why")]
    with pytest.raises(DataError, match="task 'a' has two items with the id 'c1'"):
        runner.run([task_of("a", items)], model, tokenizer, max_batch_tokens=BUDGET)


def with_memory_for(num_rows: int, model: Any) -> list[int]:
    """Memory runs out beyond so many rows; the rows of every attempt, in a list that grows."""
    attempts: list[int] = []

    def check(_: Any, arguments: Any) -> None:
        attempts.append(len(arguments[0]))
        if len(arguments[0]) > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.embed_tokens.register_forward_pre_hook(check)
    return attempts


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_a_batch_that_memory_does_not_hold_is_halved(tokenizer: Any, num_rows: int) -> None:
    tasks = [task_of("choices", choice_items(7)), task_of("answers", generation_items(7), length_of_text)]
    wanted = runner.run(tasks, adapted_model(vocab_size=VOCAB_SIZE), tokenizer, max_batch_tokens=1)
    model = adapted_model(vocab_size=VOCAB_SIZE)
    attempts = with_memory_for(num_rows, model)
    rows = runner.run(tasks, model, tokenizer, max_batch_tokens=10_000)
    assert attempts[0] == 7
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in wanted]
    assert [row["scores"] for row in rows] == [row["scores"] for row in wanted]


def test_an_item_that_memory_does_not_hold_alone_is_an_error(tokenizer: Any) -> None:
    model = adapted_model(vocab_size=VOCAB_SIZE)
    longest = max(choice_items(7), key=lambda item: len(item.prompt))

    def check(_: Any, arguments: Any) -> None:
        if arguments[0].shape[1] >= len(longest.prompt):
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.embed_tokens.register_forward_pre_hook(check)
    rows = runner.run([task_of("t", choice_items(7))], model, tokenizer, max_batch_tokens=10_000)
    assert [row["id"] for row in rows if "error" in row] == [longest.id]
    assert "memory does not hold it alone" in next(row["error"] for row in rows if "error" in row)


def test_progress_counts_this_rank_s_items(model: Any, tokenizer: Any) -> None:
    told = Told()
    with shown_by(told):
        runner.run(two_tasks(), model, tokenizer, max_batch_tokens=BUDGET, label="base")
    for name in ("choices", "answers"):
        assert {work.total for work in told.works if work.description == f"base: {name}"} == {14}
        done = [done for description, done, _ in told.updates if description == f"base: {name}"]
        assert done == sorted(done)
        assert done[-1] == 14
        assert (f"base: {name}", True) in told.ended
