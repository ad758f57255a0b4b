"""Tasks in training and an adapter's check: rows at their steps, and nothing of it in what is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmlora_dist import AdapterConfig, add_adapters, save_adapter
from ssmlora_dist.adapters.files import write_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.config.build import build_fingerprint
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.tasks import DEEP
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.errors import AdapterError, DataError
from ssmlora_dist.models import load_model, load_tokenizer
from ssmlora_dist.tracking import Console
from ssmlora_dist.training import compute_dtype, task_evaluation
from ssmlora_dist.training.task_evaluation import TasksInTraining, describe_evaluation, run_evaluation
from tests.tiny import adapted_model, randomize_adapters, tiny_config

from ..launch.processes import ON_CPU, Finished, run
from .task_worker import ALONE, BROKEN, COLOURS, EVERY_STEPS, LENGTHS, NUM_EXAMPLES, NUM_STEPS, RUNS, SHARDED

STEPS = [*range(0, NUM_STEPS, EVERY_STEPS), NUM_STEPS]


@dataclass(frozen=True)
class Runs:
    """What the runs of `task_worker.py` left."""

    directory: Path
    finished: Mapping[str, list[Finished]]

    def rows(self, name: str) -> list[dict[str, float]]:
        file = self._run(name) / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()]

    def trained(self, name: str) -> list[tuple[float, ...]]:
        """What each step says of the training, times aside."""
        keys = ("step", "loss", "grad_norm", "learning_rate")
        return [tuple(row[key] for key in keys) for row in self.rows(name) if "loss" in row]

    def answered(self, name: str) -> list[dict[str, float]]:
        return [row for row in self.rows(name) if any(key.startswith("task/") for key in row)]

    def adapter(self, name: str) -> bytes:
        return (self._run(name) / "adapter" / "adapter_model.safetensors").read_bytes()

    def _run(self, name: str) -> Path:
        return self.directory / name.replace(" ", "_") / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    directory = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps(row) for row in COLOURS]
    (directory / "colours.jsonl").write_text("\n".join(lines))
    (directory / "broken.jsonl").write_text("\n".join([*lines, "{"]))
    worker = run(["-m", "tests.training.task_worker", "results.json"], directory, **ON_CPU)
    assert worker.exit_code == 0, worker.stderr
    found = json.loads((directory / "results.json").read_text())
    finished = {
        name: [Finished(rank["exit_code"], rank["stdout"], rank["stderr"]) for rank in ranks]
        for name, ranks in found.items()
    }
    return Runs(directory, finished)


@pytest.mark.parametrize("name", [name for name in RUNS if name != BROKEN])
def test_runs_end_well(runs: Runs, name: str) -> None:
    assert {rank.exit_code for rank in runs.finished[name]} == {0}, runs.finished[name][0].stderr
    assert len(runs.trained(name)) == NUM_STEPS


@pytest.mark.parametrize("name", [ALONE, SHARDED])
def test_tasks_change_nothing_of_the_training(runs: Runs, name: str) -> None:
    """Backbone in 4 bits, dropout on: no random number, mode or repacked weight is left behind."""
    assert runs.trained(f"{name} with tasks") == runs.trained(name)
    assert runs.adapter(f"{name} with tasks") == runs.adapter(name)
    losses = [loss for _, loss, *_ in runs.trained(name)]
    assert len(set(losses)) == NUM_STEPS, "the model learns"


def test_there_are_rows_before_at_the_steps_and_at_the_end(runs: Runs) -> None:
    rows = runs.answered(f"{ALONE} with tasks")
    assert [row["step"] for row in rows] == STEPS
    assert runs.answered(ALONE) == []
    for row in rows:
        assert set(row) == {
            "step",
            "task/passkey",
            f"task/passkey/{LENGTHS[0]}",
            "task/passkey/num_failed",
            "task/colours",
        }
        assert row["task/passkey/num_failed"] == NUM_EXAMPLES, "all of the length that is too long"
        assert all(0 <= row[key] <= 1 for key in ("task/passkey", "task/colours"))
        assert row["task/passkey"] == row[f"task/passkey/{LENGTHS[0]}"], "which count in no mean"


def test_two_ranks_answer_as_one_does(runs: Runs) -> None:
    """Before training, where the models are the same; later they are so within rounding alone."""
    alone, sharded = (runs.answered(f"{name} with tasks") for name in (ALONE, SHARDED))
    assert [row["step"] for row in sharded] == STEPS
    assert sharded[0] == alone[0]


def test_a_broken_line_of_a_task_ends_a_run_before_it_begins(runs: Runs) -> None:
    [rank] = runs.finished[BROKEN]
    assert rank.exit_code == 2, rank.stderr
    assert rank.stderr.startswith("error: ../broken.jsonl:6: is not valid JSON")
    assert "Traceback" not in rank.stderr
    assert not (runs.directory / BROKEN / "run").exists()


# The rest is of one process, without others to wait for.

MODEL = tiny_config(num_layers=2, vocab_size=259, max_position_embeddings=320, bos_token_id=256)
ADAPTER = AdapterConfig(rank=2, alpha=4)
ENDINGS = {"end_token_ids": [ord("!")], "stop_texts": ["?"]}


class SingleProcess(DistributedContext):
    """A process alone."""

    def __init__(self) -> None:
        super().__init__(0, 1, 0, torch.device("cpu"))

    def on_main(self, action: Any) -> Any:
        return action()

    def gather(self, value: Any) -> list[Any]:
        return [value]


def config(every_steps: int | None = None, *tasks: dict[str, Any], **evaluation: Any) -> RunConfig:
    passkey = {"task": "passkey", "lengths": [256], "num_examples": 4}
    return RunConfig.model_validate(
        {
            "run": {"name": "run", "output_dir": "runs"},
            "model": {"init": "random", "config": MODEL, "tokenizer": "bytes", "compute_dtype": "float32"},
            "quantization": {"mode": "none"},
            "data": {"train": {"format": "task", "task": {"task": "passkey"}}},
            "training": {"max_steps": 1},
            "evaluation": {"tasks": tasks or [passkey], "tasks_every_steps": every_steps, **evaluation},
            "tracking": {"tracker": "none"},
        }
    )


def saved_adapter(
    directory: Path, settings: AdapterConfig = ADAPTER, fingerprint: str | None = None, **changes: Any
) -> Path:
    model = load_model(
        init="random", config=MODEL | changes, quantization="none", compute_dtype=torch.float32
    )
    add_adapters(model, settings)
    randomize_adapters(model)
    save_adapter(model, directory, base_fingerprint=fingerprint)
    return directory


@pytest.mark.parametrize("recorded", ["float32", "bfloat16", "float16"])
def test_tasks_are_answered_in_the_dtype_that_the_adapter_was_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    """Unless the configuration names another one; without an adapter, in the machine's own."""
    model = load_model(init="random", config=MODEL, quantization="none", compute_dtype=torch.float32)
    adapter = tmp_path / "adapter"
    write_adapter(
        adapter,
        ADAPTER,
        adapter_parameters(add_adapters(model, ADAPTER)),
        base={"init": "random", "config": MODEL, "compute_dtype": recorded},
    )
    built: list[RunConfig] = []

    def stop(config: RunConfig, *_: Any) -> None:
        built.append(config)
        raise InterruptedError

    monkeypatch.setattr(task_evaluation, "build_backbone", stop)
    monkeypatch.setattr(compute_dtype, "machine_dtype", lambda _: "bfloat16")
    named = config()
    auto = named.model_copy(update={"model": named.model.model_copy(update={"compute_dtype": "auto"})})
    for asked, trained in ((auto, adapter), (auto, None), (named, adapter)):
        with pytest.raises(InterruptedError):
            run_evaluation(asked, SingleProcess(), Console(enabled=False), adapter=trained)
    assert [found.model.compute_dtype for found in built] == [recorded, "bfloat16", "float32"]
    told = describe_evaluation(auto, "cpu", 1, adapter=adapter, warn=lambda _: None)
    assert told.startswith(f"compute dtype {recorded} (auto: what the adapter was trained in")
    assert f"\ncomputes in  {recorded}, attention" in told


def test_when_tasks_are_due() -> None:
    tasks = TasksInTraining(config(3), load_tokenizer("bytes"), SingleProcess(), ENDINGS)
    assert [step for step in range(9) if tasks.is_due(step, 8)] == [0, 3, 6, 8]
    none = TasksInTraining(config(), load_tokenizer("bytes"), SingleProcess(), ENDINGS)
    assert not any(none.is_due(step, 8) for step in range(9))


def test_items_are_made_once_for_all_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = TasksInTraining(config(3), load_tokenizer("bytes"), SingleProcess(), ENDINGS)
    monkeypatch.setitem(DEEP, "passkey", lambda *_, **__: pytest.fail("made again"))  # type: ignore[index]
    model = adapted_model(num_layers=2, vocab_size=259, max_position_embeddings=320).train()
    first, second = tasks.answer(model), tasks.answer(model)
    assert first == second
    assert set(first) == {"task/passkey", "task/passkey/256"}
    assert model.training


def test_no_tasks_are_looked_for_where_none_are_answered(tmp_path: Path) -> None:
    missing = {"task": "boolq", "path": str(tmp_path / "gone.jsonl")}
    TasksInTraining(config(None, missing), load_tokenizer("bytes"), SingleProcess(), ENDINGS)
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        TasksInTraining(config(2, missing), load_tokenizer("bytes"), SingleProcess(), ENDINGS)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"fingerprint": "f00d" * 16}, "was trained on another base model"),
        ({"hidden_size": 32}, r"lora_A.weight is \[2, 32\], the model needs \[2, 16\]"),
        ({"num_hidden_layers": 6}, "which the model has no adapter for"),
    ],
)
def test_an_adapter_that_does_not_fit_is_found_before_the_weights_are_read(
    adapter: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_evaluation, "build_backbone", lambda *_: pytest.fail("the weights are read"))
    directory = saved_adapter(tmp_path / "adapter", **adapter)
    for start in (
        lambda: run_evaluation(config(), SingleProcess(), Console(enabled=False), adapter=directory),
        lambda: describe_evaluation(config(), "cpu", 1, adapter=directory, warn=print),
    ):
        with pytest.raises(AdapterError, match=message):
            start()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_tells_evaluations_apart(tmp_path: Path) -> None:
    """Weights and settings of the adapter, base, precision and tokenizer; not where anything lies."""
    fingerprint = build_fingerprint(config())
    first, moved, rescaled = (
        task_evaluation._check_adapter(config(), saved_adapter(tmp_path / name, settings), fingerprint, print)
        for name, settings in (
            ("a", ADAPTER),
            ("b", ADAPTER),
            ("c", ADAPTER.model_copy(update={"alpha": 8.0})),
        )
    )
    assert first == moved
    assert len({first, rescaled}) == 2

    def digest(changed: RunConfig, base: str = fingerprint, adapted: str = first, template: str = "a") -> str:
        return task_evaluation._digest(changed, {"chat template": template}, base, adapted)

    elsewhere = config().model.model_copy(update={"tokenizer": "elsewhere", "attention": "eager"})
    precise = config().model.model_copy(update={"compute_dtype": "bfloat16"})
    digests = [
        digest(config()),
        digest(config(), adapted=""),
        digest(config(), adapted=rescaled),
        digest(config(), base="another"),
        digest(config(), template="b"),
        digest(config().model_copy(update={"model": precise})),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(config().model_copy(update={"model": elsewhere})) == digests[0]
    assert digest(config(None, max_batch_tokens=77)) == digests[0]


def test_what_is_evaluated_lies_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_evaluation(config(), SingleProcess(), Console(enabled=False))
    adapter = saved_adapter(tmp_path / "mine" / "adapter", fingerprint=build_fingerprint(config()))
    run_evaluation(config(), SingleProcess(), Console(enabled=False), adapter=adapter, with_base=False)
    tables = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("results.jsonl"))
    assert tables == ["mine/evaluation/adapter/results.jsonl", "runs/run-evaluation/base/results.jsonl"]


def test_a_dry_run_names_the_first_items_that_cannot_be_used(tmp_path: Path) -> None:
    rows = [{**row, "label": "none"} for row in COLOURS]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [COLOURS[0], *rows]))
    own = {"task": "multiple_choice", "name": "colours", "path": str(file)}
    lines = describe_evaluation(config(None, own), "cpu", 1, warn=print).splitlines()
    begin = lines.index("colours: 1 items, 5 that cannot be used")
    failed = lines[begin + 1 : begin + 4]
    assert lines[begin + 4].startswith("writes to ")
    assert [line.split(":")[0] for line in failed] == ["  1", "  2", "  3"]
    assert all("field 'label' holds 'none'" in line for line in failed)


def test_other_scales_than_those_of_training_are_said(tmp_path: Path) -> None:
    model = load_model(init="random", config=MODEL, quantization="nf4", compute_dtype=torch.float32)
    save_adapter(add_adapters(model, ADAPTER), tmp_path / "adapter")
    warnings: list[str] = []
    for double_quantization in (True, False):
        mode = {"quantization": {"mode": "nf4", "double_quantization": double_quantization}}
        evaluated = RunConfig.model_validate(config().model_dump(by_alias=True) | mode)
        describe_evaluation(evaluated, "cpu", 1, adapter=tmp_path / "adapter", warn=warnings.append)
    [warning] = warnings
    assert "was trained on double_quantization True, here False" in warning


def test_another_precision_than_that_of_training_is_said(tmp_path: Path) -> None:
    directory = saved_adapter(tmp_path / "adapter")
    settings = config().model_dump(by_alias=True) | {"quantization": {"mode": "nf4"}}
    warnings: list[str] = []
    describe_evaluation(config(), "cpu", 1, adapter=directory, warn=warnings.append)
    assert warnings == []
    describe_evaluation(RunConfig.model_validate(settings), "cpu", 1, adapter=directory, warn=warnings.append)
    lora = AdapterConfig(method="lora", rank=2, alternate=("q_proj", "v_proj"))
    plain = saved_adapter(tmp_path / "plain", lora)
    (plain / "ssmlora.json").unlink()
    describe_evaluation(config(), "cpu", 1, adapter=plain, warn=warnings.append)
    assert warnings == [
        f"{directory}: was trained on quantization none, here nf4: scores may differ from those in training",
        f"{plain}: was trained on quantization that is not recorded, here none; compute_dtype that is not "
        "recorded, here float32: scores may differ from those in training",
    ]


def test_answers_end_where_the_adapter_was_trained_to_end_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in an evaluation of the adapter; the base model knows nothing of it."""
    seen: list[tuple[Any, Any]] = []

    def fake_run(_: Any, model: Any, *__: Any, **___: Any) -> list[Any]:
        seen.append((model.generation_config.eos_token_id, model.generation_config.stop_strings))
        return []

    monkeypatch.setattr(task_evaluation, "run", fake_run)
    monkeypatch.setattr(task_evaluation, "_report", lambda *_: None)
    monkeypatch.setattr(task_evaluation, "metrics_of", lambda _: {})
    monkeypatch.setattr(task_evaluation, "build_reports", lambda *_, **__: [])
    model = adapted_model(num_layers=2, vocab_size=259)
    TasksInTraining(config(3), load_tokenizer("bytes"), SingleProcess(), ENDINGS).answer(model)
    adapter = saved_adapter(tmp_path / "adapter")
    settings = json.loads((adapter / "ssmlora.json").read_text())
    (adapter / "ssmlora.json").write_text(json.dumps({**settings, "base": ENDINGS}))
    run_evaluation(config(), SingleProcess(), Console(enabled=False), adapter=adapter, out=tmp_path / "out")
    trained = ([ord("!"), 257], ["?"])
    assert seen == [trained, (None, None), trained]
