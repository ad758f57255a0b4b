"""Tasks answered by the base model and by an adapted one, and what is left of it: rows, table, pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssmlora_dist.adapters.files import WEIGHTS_FILE, read_adapter
from ssmlora_dist.api import load_adapter
from ssmlora_dist.config.build import (
    backbone_settings,
    build_backbone,
    build_fingerprint,
    build_tokenizer,
    check_model,
)
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.tasks import build_tasks
from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.durable import explained, write_text
from ssmlora_dist.evaluation.item_rows import Row
from ssmlora_dist.evaluation.items import FailedItem, Task
from ssmlora_dist.evaluation.report import build_reports, draw, markdown_table, metrics_of, plain
from ssmlora_dist.evaluation.runner import run
from ssmlora_dist.tracking import (
    Console,
    ProgressBar,
    environment_record,
    flat_parameters,
    mlflow_tracker,
)
from ssmlora_dist.training.report import environment_tags

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, ADAPTER = "base", "adapter"
SHOWN_FAILURES = 3
SUMMARY_FILE, TABLE_FILE, PLOTS = "summary.json", "table.md", "plots"


def run_evaluation(
    config: RunConfig,
    group: ProcessGroup,
    console: Console,
    *,
    adapter: Path | None = None,
    out: Path | None = None,
    names: Sequence[str] = (),
    lengths: Sequence[int] = (),
    with_base: bool = True,
) -> None:
    """Evaluates the configured backbone, and an adapter on it, on tasks; every rank calls it.

    Started again with the same directory it does what is missing.

    Args:
        config: of a run: its model, quantization and evaluation sections count.
        group: its processes, each of which holds the whole model and answers a share of the items.
        console: of rank 0.
        adapter: directory of the adapter; None for the base model alone.
        out: where results go; by default `evaluation` in the run's directory, or beside the adapter.
        names: of the tasks; by default those in `evaluation.tasks`.
        lengths: in place of those configured, of generated tasks.
        with_base: whether the base model is evaluated beside an adapter.

    Raises:
        SSMLoRAError: bad input, before the backbone is loaded where that is possible.
    """
    check_model(config)
    tokenizer = build_tokenizer(config.model)
    tasks = build_tasks(config, tokenizer, names, lengths)
    beside = adapter.parent if adapter is not None else config.run.output_dir / config.run.name
    directory = out or beside / "evaluation"
    fingerprint: str = group.on_main(lambda: build_fingerprint(config))
    model = build_backbone(config, group.device)
    if adapter is not None:
        # What is wrong with it shows before the base model has answered everything.
        read_adapter(adapter, num_layers=model.config.num_hidden_layers)
    rows: dict[str, Sequence[Row]] = {}

    def answer(name: str, weights: str) -> None:
        rows[name] = run(
            tasks,
            model,
            tokenizer,
            max_batch_tokens=config.evaluation.max_batch_tokens,
            directory=directory / name,
            digests=dict.fromkeys((task.name for task in tasks), _digest(config, fingerprint, weights)),
            rank=group.rank,
            size=group.world_size,
            gather=group.gather,
            progress=_Progress(console, name),
        )

    if adapter is None or with_base:
        answer(BASE, "")
    if adapter is not None:
        load_adapter(model, adapter, base_fingerprint=fingerprint)
        answer(ADAPTER, hashlib.sha256((adapter / WEIGHTS_FILE).read_bytes()).hexdigest())
    group.on_main(lambda: _report(config, console, tasks, rows, directory))


class TasksInTraining:
    """The configured tasks, answered by the model as it is in the middle of training; metrics only.

    Args:
        config: of the run.
        tokenizer: of the model.
        group: its processes, each of which holds the whole model.

    Raises:
        DataError: a task's data cannot be used.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, group: ProcessGroup) -> None:
        self._every_steps = config.evaluation.tasks_every_steps
        self._max_batch_tokens = config.evaluation.max_batch_tokens
        self._tokenizer, self._group = tokenizer, group
        self._tasks = build_tasks(config, tokenizer) if self._every_steps else []
        for task in self._tasks:
            # What is wrong with its data shows now.
            next(iter(task.items()), None)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to answer after `step` steps: before training, every so many steps, and at the end."""
        return self._every_steps is not None and (step % self._every_steps == 0 or step == num_steps)

    def answer(self, model: PreTrainedModel) -> dict[str, float]:
        """`task/NAME` and `task/NAME/LENGTH` to the mean of the task's metric; every rank calls it."""
        rows = run(
            self._tasks,
            model,
            self._tokenizer,
            max_batch_tokens=self._max_batch_tokens,
            rank=self._group.rank,
            size=self._group.world_size,
            gather=self._group.gather,
        )
        return metrics_of(build_reports(self._tasks, {"task": rows}))


def describe_tasks(config: RunConfig, names: Sequence[str] = (), lengths: Sequence[int] = ()) -> str:
    """How many items every task has, for `--dry-run`; makes them all.

    Raises:
        SSMLoRAError: whatever would stop the evaluation before the weights are read.
    """
    check_model(config)
    lines = []
    for task in build_tasks(config, build_tokenizer(config.model), names, lengths):
        items = list(task.items())
        failed = [item for item in items if isinstance(item, FailedItem)]
        lines.append(f"{task.name}: {len(items) - len(failed)} items, {len(failed)} that cannot be used")
        lines += [f"  {item.id}: {item.error}" for item in failed[:SHOWN_FAILURES]]
    return "\n".join(lines)


def _digest(config: RunConfig, fingerprint: str, weights: str) -> str:
    """Of what decides a model's answers, wherever its files lie."""
    settings = backbone_settings(config)
    settings = {key: settings[key] for key in ("compute_dtype", "quantization", "double_quantization")}
    return json.dumps([fingerprint, weights, settings])


class _Progress:
    """A bar for each task."""

    def __init__(self, console: Console, model: str) -> None:
        self._console, self._model = console, model
        self._task: str | None = None
        self._bar: ProgressBar

    def __call__(self, task: str, done: int, total: int) -> None:
        if total == 0:
            return
        if task != self._task:
            self._task, self._bar = task, self._console.progress(total, f"{self._model}: {task}")
        self._bar.update(done)
        if done == total:
            self._bar.close()


def _report(
    config: RunConfig,
    console: Console,
    tasks: Sequence[Task],
    rows: Mapping[str, Sequence[Row]],
    directory: Path,
) -> None:
    reports = build_reports(tasks, rows)
    table = markdown_table(reports)
    summary = {"tasks": plain(reports), "environment": environment_record()}
    with explained(directory, "choose another --out"):
        write_text(directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        write_text(directory / TABLE_FILE, table + "\n")
        draw(reports, directory / PLOTS)
    console.message(table)
    if config.tracking.tracker == "mlflow":
        _track(config, console, metrics_of(reports), directory)
    console.message(f"{directory}: {SUMMARY_FILE}, {TABLE_FILE}, {PLOTS}/ and every item's row")


def _track(config: RunConfig, console: Console, metrics: Mapping[str, float], directory: Path) -> None:
    """A run of its own, once all is there: an evaluation that is cut short and goes on is one run."""
    tracking, environment = config.tracking, environment_record()
    tracker = mlflow_tracker(config.run.output_dir, tracking.uri, tracking.experiment, console.warn)
    parameters = config.model_dump(mode="json", include={"run", "model", "quantization", "evaluation"})
    tracker.start(f"{config.run.name}-evaluation", flat_parameters(parameters), environment_tags(environment))
    tracker.log_metrics(metrics, step=0)
    tracker.log_directory(directory, "evaluation")
    tracker.finish("FINISHED")
