"""A run that goes on finds its data and its tokenizer, wherever they lie, or says what is other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import chat_template_utils

from ssmlora_dist import prose
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.context import DistributedContext, start_process_group, stop_process_group
from ssmlora_dist.errors import CheckpointError, ConfigError, DataError, SSMLoRAError
from ssmlora_dist.models import load_tokenizer
from ssmlora_dist.tracking import Console, RunDirectory
from ssmlora_dist.training import contents, resume_point
from ssmlora_dist.training.describe import describe
from ssmlora_dist.training.resume_point import ResumePoint
from ssmlora_dist.training.run import run_training

from .checkpoint_cases import checkpoint

DEBUG_TINY = Path(__file__).resolve().parents[2] / "configs" / "debug_tiny.json"
NUM_RECORDS = 12
COMMON = (
    "run.name=run",
    "training.global_batch_size=2",
    "training.warmup_steps=0",
    "data.max_length=64",
    "data.validation=null",
    "evaluation.every_steps=null",
    "tracking.tracker=none",
)


@pytest.fixture(scope="module")
def context() -> Iterator[DistributedContext]:
    yield start_process_group(60)
    stop_process_group()


class Runs:
    """Runs of a directory of their own: each call is one start."""

    def __init__(
        self, context: DistributedContext, directory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.directory, self._context, self._capsys = directory, context, capsys
        self.rows = [{"prompt": "ab"[i % 2], "answer": f"{i:03}"} for i in range(NUM_RECORDS)]
        self.write("here.jsonl", self.rows)
        self.tokenizer = directory / "tokenizer"
        load_tokenizer("bytes").save_pretrained(self.tokenizer)

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (self.directory / name).write_text(text)

    def train(self, num_steps: int, *overrides: str, **source: Any) -> str:
        """One start, with `--resume auto`; what it said on the standard error stream."""
        run_training(
            self._config(num_steps, *overrides, **source), self._context, Console(enabled=True), "auto"
        )
        return self._capsys.readouterr().err

    def dry_run(self, num_steps: int, *overrides: str, **source: Any) -> str:
        """What a start, with `--resume auto`, would do."""
        return describe(self._config(num_steps, *overrides, **source), "cpu", 1, "auto", lambda _: None)

    def _config(self, num_steps: int, *overrides: str, path: str = "here.jsonl", **source: Any) -> RunConfig:
        train = {"format": "instruction", "fields": {"instruction": "prompt", "output": "answer"}, **source}
        train["path"] = str(self.directory / path)
        given = [
            f"run.output_dir={self.directory / 'runs'}",
            f"data.train={json.dumps(train)}",
            f"model.tokenizer={self.tokenizer}",
            f"training.max_steps={num_steps}",
        ]
        return load_config(DEBUG_TINY, [*COMMON, *given, *overrides], device_type="cpu")

    @property
    def losses(self) -> list[float]:
        lines = (self.directory / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture
def runs(context: DistributedContext, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(context, tmp_path, capsys)


STREAM = {"streaming": True, "shuffle_buffer_size": 3}


@pytest.mark.parametrize("source", [{}, STREAM], ids=["in memory", "streamed"])
def test_the_same_data_and_tokenizer_elsewhere_go_on(runs: Runs, source: dict[str, Any]) -> None:
    runs.train(2, **source)
    (runs.directory / "here.jsonl").rename(runs.directory / "there.jsonl")
    moved = runs.directory / "scratch"
    shutil.move(runs.tokenizer, moved)
    runs.tokenizer = moved
    runs.train(3, path="there.jsonl", **source)
    assert len(runs.losses) == 3


@pytest.mark.parametrize("source", [{}, STREAM], ids=["in memory", "streamed"])
def test_other_data_under_the_same_name_are_refused(runs: Runs, source: dict[str, Any]) -> None:
    runs.train(2, **source)
    runs.write("here.jsonl", [{**runs.rows[0], "answer": "xxx"}, *runs.rows[1:]])
    with pytest.raises(SSMLoRAError, match="other"):
        runs.train(3, **source)
    with pytest.raises(SSMLoRAError, match="other"):
        runs.dry_run(3, **source)
    assert torch.isfinite(torch.tensor(runs.losses)).all()
    assert len(runs.losses) == 2


def test_the_message_has_both_counts_and_names_the_remedy(runs: Runs) -> None:
    runs.train(2)
    runs.write("here.jsonl", runs.rows[:-1])
    with pytest.raises(CheckpointError) as caught:
        runs.train(3)
    assert (
        "step-00000002: was trained on other data than data.train: 12 examples of 12 records in the"
        in str(caught.value)
    )
    # What holds the error holds the refused run's frames, and not its directory.
    RunDirectory.create(runs.directory / "runs" / "run", resume=True).release()
    assert "checkpoint, 11 examples of 11 records given here; restore the data, wherever they lie, or" in str(
        caught.value
    )


def change_vocabulary(directory: Path) -> None:
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))


def change_special_tokens(directory: Path) -> None:
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|pad|>"}))


def change_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_vocabulary, "vocabulary"),
        (change_special_tokens, "special tokens"),
        (change_template, "chat template"),
    ],
)
@pytest.mark.parametrize("source", [{}, STREAM], ids=["in memory", "streamed"])
def test_another_tokenizer_is_refused_and_what_is_other_named(
    runs: Runs, source: dict[str, Any], change: Any, named: str
) -> None:
    runs.train(1, **source)
    change(runs.tokenizer)
    with pytest.raises(CheckpointError, match=rf"model\.tokenizer: other {named}; restore it, wherever"):
        runs.train(2, **source)
    with pytest.raises(CheckpointError, match=rf"model\.tokenizer: other {named}; restore it, wherever"):
        runs.dry_run(2, **source)


def test_a_dry_run_says_what_the_run_would(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = "model.compute_dtype=auto"
    # Not what any machine would choose by itself.
    runs.train(2, "model.compute_dtype=float16")
    goes_on = runs.dry_run(3, auto)
    assert "\ncompute dtype float16 (auto: what the adapter was trained in" in goes_on
    assert "\ncomputes in  float16, attention" in goes_on
    assert "\nbegins       after step 2, from" in goes_on
    assert "run: complete, all 2 steps are done; raise training.max_steps to" in runs.dry_run(2, auto)
    with pytest.raises(ConfigError, match=r"training\.max_steps: 1 given or derived; 2 are done in"):
        runs.dry_run(1, auto)
    monkeypatch.setattr(resume_point, "build_fingerprint", lambda config: "beef")
    with pytest.raises(CheckpointError, match="was trained on another base model"):
        runs.dry_run(3, auto)


def test_a_changed_setting_is_named_before_the_data_that_it_changes(runs: Runs) -> None:
    runs.train(1)
    with pytest.raises(ConfigError, match=r"data\.max_length: 16 given, 64 in the checkpoint"):
        runs.train(2, "data.max_length=16")


def test_generated_data_are_compared_with_their_text(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"format": "task", "task": {"task": "niah_single_2", "lengths": [500], "num_examples": 2}}
    generated = [f"data.train={json.dumps(source)}", "data.max_length=500"]
    runs.train(1, *generated)
    runs.train(2, *generated)
    monkeypatch.setattr(prose, "sentences", lambda: ["Another text.", "It came with another Python."] * 99)
    with pytest.raises(
        CheckpointError, match=r"as many given here, but of other contents \(generated from a text"
    ):
        runs.train(3, *generated)


def test_a_template_that_prints_the_date_prints_that_of_the_first_start(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% set today = strftime_now('%d %b %Y, %H:%M:%S') %}{{ today }}{% for m in messages %}"
        "<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}|{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (runs.tokenizer / "chat_template.jinja").write_text(template)
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    runs.write("here.jsonl", [{"messages": messages}] * 2)
    chat = {"format": "chat", "fields": {}}
    runs.train(1, **chat)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2031, 1, 2, 3, 4, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    monkeypatch.setattr(contents, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()
    runs.train(2, **chat)


def test_losses_on_other_validation_data_are_not_compared(runs: Runs) -> None:
    runs.write("easy.jsonl", [{"prompt": "a", "answer": "000"}])
    fields = '"fields":{"instruction":"prompt","output":"answer"}'
    checked = ["evaluation.every_steps=1", "checkpoint.keep=1"]

    def validation(name: str) -> str:
        return f'data.validation={{"format":"instruction","path":"{runs.directory / name}",{fields}}}'

    runs.train(2, validation("easy.jsonl"), *checked)
    said = runs.train(2, validation("here.jsonl"), "training.max_steps=3", *checked)
    assert "data.validation: not the examples evaluated on before" in said
    summary = json.loads((runs.directory / "runs" / "run" / "summary.json").read_text())
    assert summary["evaluation"]["before"] is None
    assert summary["evaluation"]["after"]["all"]["num_examples"] == NUM_RECORDS
    *_, newest = sorted((runs.directory / "runs" / "run" / "checkpoints").glob("step-00000003*"))
    progress = json.loads((newest / "trainer_state.json").read_text())["progress"]
    assert progress["best_validation_loss"] == pytest.approx(summary["evaluation"]["after"]["all"]["loss"])


def test_a_run_that_goes_on_keeps_to_the_commit_of_its_first_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contents, "resolve_revision", lambda hub, subset, revision: f"commit of {revision}")

    def config(**source: Any) -> RunConfig:
        train = {"format": "text", "hub": "some/set", **source}
        sections = {"run": {"name": "run"}, "model": {"path": "a/b"}, "training": {"max_steps": 1}}
        return RunConfig.model_validate({**sections, "data": {"train": train}})

    then = contents.revisions(config(), ResumePoint())
    assert then == {"train": {"hub": "some/set", "revision": None, "commit": "commit of None"}}
    goes_on = ResumePoint(checkpoint(contents={"revisions": then}))
    again = contents.revisions(config(), goes_on)
    assert contents.pinned(config(), again).data.train.revision == "commit of commit of None"
    # Another one on purpose, whose contents are then compared.
    other = contents.revisions(config(revision="v2"), goes_on)
    assert contents.pinned(config(revision="v2"), other).data.train.revision == "commit of v2"


def test_every_rank_must_have_read_the_same() -> None:
    one = {"num_examples": 2, "num_records": 2, "sha256": "a"}
    contents.check_ranks([one, one])
    with pytest.raises(DataError, match="rank 1 has read 2 examples of 2 records, rank 0 2 examples of 2"):
        contents.check_ranks([one, one | {"sha256": "b"}])
