"""Tasks answered by the base model and by an adapted one, and what is left of it: rows, table, pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssmlora_dist.adapters.files import WEIGHTS_FILE, read_adapter, read_base
from ssmlora_dist.api import load_adapter
from ssmlora_dist.config.build import (
    ENDINGS,
    backbone_settings,
    build_backbone,
    build_fingerprint,
    build_store,
    build_tokenizer,
    check_model,
    check_tracking,
    meta_model,
    set_endings,
    shapes_of,
    with_recorded_rope,
)
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.tasks import build_tasks, output_directory
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.durable import explained, write_text
from ssmlora_dist.evaluation.item_rows import RESULTS_FILE, Row
from ssmlora_dist.evaluation.items import FailedItem, Task
from ssmlora_dist.evaluation.report import build_reports, draw, markdown_table, metrics_of, plain
from ssmlora_dist.evaluation.runner import run
from ssmlora_dist.models import empty_model, max_positions, structure_of, tokenizer_digests
from ssmlora_dist.models.configuration import ROPE
from ssmlora_dist.precision import DTypeName, machine_dtype
from ssmlora_dist.progress import counted, progress
from ssmlora_dist.tracking import (
    Console,
    Store,
    environment_record,
    flat_parameters,
    mlflow_tracker,
)
from ssmlora_dist.training.compute_dtype import choose_compute_dtype, settle_compute_dtype
from ssmlora_dist.training.header import evaluation_header
from ssmlora_dist.training.lack_of_memory import Work, named_lack_of_memory
from ssmlora_dist.training.report import environment_tags

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, ADAPTER = "base", "adapter"
SHOWN_FAILURES = 3
SUMMARY_FILE, TABLE_FILE, PLOTS = "summary.json", "table.md", "plots"


def run_evaluation(
    config: RunConfig,
    context: DistributedContext,
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
        context: its processes, each of which holds the whole model and answers a share of the items.
        console: of rank 0.
        adapter: directory of the adapter; None for the base model alone.
        out: where results go; by default `config.tasks.output_directory`.
        names: of the tasks; by default those in `evaluation.tasks`.
        lengths: in place of those configured, of generated tasks.
        with_base: whether the base model is evaluated beside an adapter.

    Raises:
        SSMLoRAError: bad input, before the backbone is loaded where that is possible.
    """
    if adapter is not None:
        config = with_recorded_rope(config, adapter)
    config = settle_compute_dtype(config, context, console, kept=_dtype_of(adapter), for_training=False)
    context.on_main(lambda: check_tracking(config, console.warn))
    check_model(config, for_training=False)
    tokenizer = build_tokenizer(config.model, console.warn)
    tasks = _with_items(build_tasks(config, tokenizer, names, lengths))
    directory = out or output_directory(config, adapter)
    names_of_tasks = [task.name for task in tasks]
    parts = tokenizer_digests(tokenizer)
    fingerprint: str = context.on_main(lambda: build_fingerprint(config))
    # What is wrong with it shows before the base model has answered everything.
    adapted = "" if adapter is None else _check_adapter(config, adapter, fingerprint, console.warn)
    if context.is_main:
        console.message(
            evaluation_header(
                config,
                context.device,
                context.world_size,
                adapter=adapter,
                tasks=_task_lines(tasks),
                directory=directory,
            )
        )
    # What an item takes beside it is that item's failure.
    with named_lack_of_memory(config, context, Work(), lambda: "started again, it does what is missing"):
        model = build_backbone(config, context.device)
    rows: dict[str, Sequence[Row]] = {}

    def answer(name: str, adapted: str) -> None:
        rows[name] = run(
            tasks,
            model,
            tokenizer,
            max_batch_tokens=config.evaluation.max_batch_tokens,
            max_length=max_positions(model.config),
            directory=directory / name,
            digests=dict.fromkeys(names_of_tasks, _digest(config, parts, fingerprint, adapted)),
            rank=context.rank,
            size=context.world_size,
            gather=context.gather,
            label=name,
        )

    if adapter is None or with_base:
        answer(BASE, "")
    if adapter is not None:
        load_adapter(model, adapter, base_fingerprint=fingerprint)
        set_endings(model, tokenizer, read_base(adapter))
        answer(ADAPTER, adapted)
    context.on_main(lambda: _report(config, console, tasks, rows, directory))


class TasksInTraining:
    """The configured tasks, answered by the model as it is in the middle of training; metrics only.

    Args:
        config: of the run.
        tokenizer: of the model.
        context: its processes, each of which holds the whole model.
        endings: what ends the answers that are trained, see `TextEncoder.endings`.

    Raises:
        DataError: a task's data cannot be used.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        context: DistributedContext,
        endings: Mapping[str, Any],
    ) -> None:
        self._endings = endings
        self._every_steps = config.evaluation.tasks_every_steps
        self._max_batch_tokens = config.evaluation.max_batch_tokens
        self._tokenizer, self._context = tokenizer, context
        self._tasks = _with_items(build_tasks(config, tokenizer)) if self._every_steps else []

    @property
    def notes(self) -> list[str]:
        """What of the tasks' records is to be known."""
        return unused_field_lines(self._tasks)

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to answer after `step` steps: before training, every so many steps, and at the end."""
        return self._every_steps is not None and (step % self._every_steps == 0 or step == num_steps)

    def answer(self, model: PreTrainedModel) -> dict[str, float]:
        """What `report.metrics_of` has of a model called `task`; every rank calls it."""
        set_endings(model, self._tokenizer, self._endings)
        rows = run(
            self._tasks,
            model,
            self._tokenizer,
            max_batch_tokens=self._max_batch_tokens,
            max_length=max_positions(model.config),
            rank=self._context.rank,
            size=self._context.world_size,
            gather=self._context.gather,
        )
        return metrics_of(build_reports(self._tasks, {"task": rows}, with_majority=False))


def describe_evaluation(
    config: RunConfig,
    device_type: str,
    world_size: int,
    *,
    adapter: Path | None = None,
    out: Path | None = None,
    names: Sequence[str] = (),
    lengths: Sequence[int] = (),
    warn: Callable[[str], object],
) -> str:
    """What an evaluation would do, for `--dry-run`; makes all items. `warn` is told what it would be.

    Raises:
        SSMLoRAError: whatever would stop the evaluation before the weights are read.
    """
    chosen = []
    if adapter is not None:
        config = with_recorded_rope(config, adapter)
    if config.model.compute_dtype == "auto":
        choices, kept = [machine_dtype(device_type)], _dtype_of(adapter)
        config, line = choose_compute_dtype(
            config, choices, device_type, world_size, kept=kept, for_training=False
        )
        chosen.append(line)
    check_tracking(config, warn)
    check_model(config, for_training=False)
    if adapter is not None:
        _check_adapter(config, adapter, build_fingerprint(config), warn)
    tasks = _with_items(build_tasks(config, build_tokenizer(config.model, warn), names, lengths))
    header = evaluation_header(
        config,
        torch.device(device_type),
        world_size,
        adapter=adapter,
        tasks=_task_lines(tasks),
        directory=out or output_directory(config, adapter),
    )
    return "\n".join([*chosen, header])


def _dtype_of(adapter: Path | None) -> DTypeName | None:
    """What an adapter was trained in, as far as that is recorded."""
    return None if adapter is None else read_base(adapter).get("compute_dtype")


def _task_lines(tasks: Sequence[Task]) -> list[str]:
    """How many items every task has, what is wrong with others, and what of their records nobody reads."""
    lines = []
    for task in tasks:
        items = list(task.items())
        failed = [item for item in items if isinstance(item, FailedItem)]
        lines.append(f"{task.name}: {len(items) - len(failed)} items, {len(failed)} that cannot be used")
        lines += [f"  {item.id}: {item.error}" for item in failed[:SHOWN_FAILURES]]
        lines += unused_field_lines([task])
    return lines


def unused_field_lines(tasks: Sequence[Task]) -> list[str]:
    """For each task whose items are made, the fields of its records that nobody reads, if there are any."""
    return [f"{task.name}: {text}" for task in tasks if (text := task.unused.text()) is not None]


def _with_items(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with their items at hand: what is wrong with their data shows now, and they are made once."""
    made = []
    for task in tasks:
        items = list(counted(task.items(), f"making items of {task.name}", unit="items"))
        made.append(replace(task, items=partial(iter, items)))
    return made


def _check_adapter(config: RunConfig, adapter: Path, fingerprint: str, warn: Callable[[str], object]) -> str:
    """What of an adapter decides answers, once it has been loaded on a model without storage.

    An adapter may be answered with on another precision than it was trained on; `warn` is told.

    Raises:
        AdapterError: it cannot be read, or belongs to another base model.
    """
    structure = structure_of(empty_model(shapes_of(config.model)))
    saved = read_adapter(adapter, structure.layers, structure.linears)
    model = meta_model(config.model_copy(update={"adapter": saved.config}))
    load_adapter(model, adapter, base_fingerprint=fingerprint)
    settings = backbone_settings(config)
    keys = ["quantization", "compute_dtype"]
    if saved.base.get("quantization") == settings["quantization"] in ("nf4", "fp4"):
        keys.append("double_quantization")
    differing = [
        f"{key} {saved.base.get(key, 'that is not recorded')}, here {settings[key]}"
        for key in keys
        if saved.base.get(key) != settings[key]
    ]
    if differing:
        warn(f"{adapter}: was trained on {'; '.join(differing)}: scores may differ from those in training")
    weights = hashlib.sha256((adapter / WEIGHTS_FILE).read_bytes()).hexdigest()
    endings = {key: saved.base[key] for key in ENDINGS if key in saved.base}
    return json.dumps([weights, saved.config.model_dump(mode="json"), *([endings] if endings else [])])


def _digest(config: RunConfig, tokenizer: Mapping[str, str], fingerprint: str, adapted: str) -> str:
    """Of what decides a model's answers, wherever its files lie."""
    settings = backbone_settings(config) | {"tokenizer": tokenizer}
    keys = ["compute_dtype", "quantization", "double_quantization", "tokenizer"]
    keys += [ROPE] if settings[ROPE] else []
    return json.dumps([fingerprint, adapted, {key: settings[key] for key in keys}])


def _report(
    config: RunConfig,
    console: Console,
    tasks: Sequence[Task],
    rows: Mapping[str, Sequence[Row]],
    directory: Path,
) -> None:
    for task in tasks:
        _warn_of_failures(console, task.name, rows)
    reports = build_reports(tasks, rows)
    table = markdown_table(reports)
    store = build_store(config)
    recorded = store.record() if store is not None else None
    summary = {
        "tasks": plain(reports),
        "compute_dtype": config.model.compute_dtype,
        "tracking": recorded,
        "environment": environment_record(),
    }
    with explained(directory, "choose another --out"):
        write_text(directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
        write_text(directory / TABLE_FILE, table + "\n")
        with progress("drawing the plots"):
            plots = draw(reports, directory / PLOTS)
    console.message(table)
    files = [directory / SUMMARY_FILE, directory / TABLE_FILE, *plots]
    files += [directory / model / RESULTS_FILE for model in rows]
    if store is not None:
        _track(config, store, console, metrics_of(reports), directory, files)
    drawn = f", {PLOTS}/" if plots else ""
    console.message(f"{directory}: {SUMMARY_FILE}, {TABLE_FILE}{drawn} and every item's row")


def _warn_of_failures(console: Console, task: str, rows: Mapping[str, Sequence[Row]]) -> None:
    """Of items that have no score under any or all of the models."""
    own = [row for of_model in rows.values() for row in of_model if row["task"] == task]
    errors = {row["id"]: row["error"] for row in own if "error" in row}
    if errors:
        item, error = next(iter(errors.items()))
        console.warn(
            f"{task}: {len(errors)} of {len({row['id'] for row in own})} items failed and count in no score; "
            f"the first, {item}: {error}"
        )


def _track(
    config: RunConfig,
    store: Store,
    console: Console,
    metrics: Mapping[str, float],
    directory: Path,
    files: Sequence[Path],
) -> None:
    """A run of its own, once all is there: an evaluation that is cut short and goes on is one run."""
    tracker = mlflow_tracker(store, console.warn)
    parameters = config.model_dump(mode="json", include={"run", "model", "quantization", "evaluation"})
    tags = environment_tags(environment_record()) | config.tracking.tags
    with progress("beginning the record of the evaluation"):
        tracker.start(f"{config.run.name}-evaluation", flat_parameters(parameters), tags)
    tracker.log_metrics(metrics, step=0)
    for file in files:
        tracker.log_artifact(file, str(Path("evaluation") / file.parent.relative_to(directory)))
    with progress("completing the record of the evaluation"):
        tracker.finish("FINISHED")
