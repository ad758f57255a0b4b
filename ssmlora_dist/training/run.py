"""One whole run: from a configuration to a run directory with adapter, metrics and summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ssmlora_dist.adapters.files import write_adapter
from ssmlora_dist.adapters.health import watch_state
from ssmlora_dist.adapters.placement import time_axes
from ssmlora_dist.config.build import (
    backbone_settings,
    build_data,
    build_fingerprint,
    build_tokenizer,
    check_model,
)
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data import Dataset, GlobalBatches
from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.evaluation.teacher_forced import OVERALL, Score
from ssmlora_dist.tracking import (
    BeforeAfter,
    Console,
    NullTracker,
    RunDirectory,
    RunStatus,
    Tracker,
    environment_record,
    flat_parameters,
    mlflow_tracker,
    plot_curves,
    store_uri,
)
from ssmlora_dist.training.evaluation import evaluate
from ssmlora_dist.training.loop import StepRecord, train
from ssmlora_dist.training.metrics import ModelShape, peak_memory_gib, peak_tflops, usable_memory_bytes
from ssmlora_dist.training.schedule import learning_rate
from ssmlora_dist.training.topology import build_engine, place_of, plan_stages

Scores = dict[str, Score]
# Of the memory that is free before loading, what is planned with: the rest is for allocators and libraries.
MEMORY_SHARE = 0.85


def run_training(config: RunConfig, group: ProcessGroup, console: Console) -> None:
    """Trains an adapter as configured; every rank calls it, rank 0 writes and shows.

    Raises:
        SSMLoRAError: bad input, found before the backbone is loaded where that is possible, or training that
            failed; the run directory and the tracker then say so.
    """
    directory = RunDirectory(config.run.output_dir / config.run.name)
    group.on_main(lambda: RunDirectory.check_free(directory.path))
    check_model(config)
    tokenizer = build_tokenizer(config.model)
    train_data, validation = build_data(config, tokenizer)
    tracker = _tracker(config, group, console)
    run = _Run(config, group, console, tracker, directory, tokenizer.pad_token_id, train_data, validation)
    run.build()
    # Only now: what a run refused for bad input would leave behind would block the next one of its name.
    group.on_main(directory.claim)
    status: RunStatus = "FAILED"
    try:
        if group.is_main:
            resolved = config.model_dump(mode="json", by_alias=True)
            directory.write_config(resolved)
            tracker.start(config.run.name, flat_parameters(resolved), _tags(environment_record()))
        run.execute()
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


@dataclass
class _Run:
    """The parts of one run, and its phases in order."""

    config: RunConfig
    group: ProcessGroup
    console: Console
    tracker: Tracker
    directory: RunDirectory
    pad_token_id: int
    train_data: Dataset
    validation: Dataset | None

    def execute(self) -> None:
        """Evaluate, train, save, evaluate, summarise."""
        before = self._evaluate(step=0)
        records: list[StepRecord] = []
        training_started = time.perf_counter()
        # Of dropout: masks of their own on every rank, and other ones with every seed.
        torch.manual_seed(self.config.run.seed * self.group.world_size + self.group.rank)
        with self.console.progress(self.num_steps, "training") as progress:
            train(
                self.engine,
                self.batches.micro_batches,
                self._learning_rate,
                num_steps=self.num_steps,
                max_nonfinite_steps=self.config.training.max_nonfinite_steps,
                on_step=partial(self._on_step, records, progress.update),
            )
        training_seconds = time.perf_counter() - training_started
        # Before anything else can go wrong.
        self._save_adapter()
        after = self._evaluate(step=self.num_steps)
        summary = {
            **_training_summary(records, self.group.world_size),
            "training_seconds": training_seconds,
            "wall_seconds": time.perf_counter() - self.started,
            "peak_memory_gib": peak_memory_gib(self.group),
            "num_trainable_parameters": self.num_trainable,
            "evaluation": {"before": _plain(before), "after": _plain(after)},
            "data": {
                "train": asdict(self.train_data.report),
                "validation": asdict(self.validation.report) if self.validation else None,
            },
            "environment": environment_record(),
        }
        if self.group.is_main:
            self._finish(summary, before, after)

    def build(self) -> None:
        """Loads the backbone, adapts it and hands it to the engine."""
        self.started = time.perf_counter()
        self.group.on_main(self._take_fingerprint)
        self.place = place_of(self.config, self.group)
        plan = None
        if self.place.num_stages > 1:
            memory = -self.group.max([-usable_memory_bytes(self.group)])[0]
            plan = plan_stages(self.config, self.train_data, self.place, MEMORY_SHARE * memory)
            self.console.message(plan.table)
        built = build_engine(self.config, self.group, self.place, plan)
        self.engine = built.engine
        self.shape = ModelShape.of(built.model_config)
        self.num_trainable = int(self.group.sum([built.num_trainable])[0]) // self.place.data_parallel_size
        training = self.config.training
        self.batches = GlobalBatches(
            self.train_data,
            training.global_batch_size,
            training.micro_batch_size,
            self.place.data_parallel_rank,
            self.place.data_parallel_size,
            self.config.run.seed,
            self.pad_token_id,
        )
        assert training.num_epochs or training.max_steps, "refused by config.rules"
        self.num_steps = training.max_steps or self.batches.num_steps(training.num_epochs or 1.0)

    def _take_fingerprint(self) -> None:
        """On rank 0 alone, which writes it: a part of every tensor is read."""
        self.fingerprint = build_fingerprint(self.config)

    def _learning_rate(self, step: int) -> float:
        training = self.config.training
        return learning_rate(
            step,
            schedule=training.schedule,
            peak=training.learning_rate,
            warmup_steps=training.warmup_steps,
            num_steps=self.num_steps,
        )

    def _evaluate(self, step: int) -> Scores | None:
        if self.validation is None:
            return None
        place = self.place
        with watch_state(self.engine.module, time_axes(self.config.adapter), self.group.device) as health:
            scores = evaluate(
                self.engine.score,
                self.validation,
                micro_batch_size=self.config.evaluation.micro_batch_size,
                pad_token_id=self.pad_token_id,
                data_parallel_rank=place.data_parallel_rank,
                data_parallel_size=place.data_parallel_size,
                # Every stage has the scores of its replica.
                sum_over_ranks=lambda values: [v / place.num_stages for v in self.group.sum(values)],
            )
        row = health.metrics(self.group.sum(health.sums.flatten().tolist()))
        if self.group.is_main:
            for length, score in scores.items():
                suffix = "" if length == OVERALL else f"_{length}"
                row[f"validation_loss{suffix}"] = score.loss
                row[f"validation_exact_match{suffix}"] = score.exact_match
            self._log(row, step)
        return scores

    def _on_step(self, records: list[StepRecord], show: Callable[..., None], record: StepRecord) -> None:
        records.append(record)
        row = self._row(record)
        show(record.step, loss=record.result.loss, tokens_per_second=row["tokens_per_second"])
        if self.group.is_main and record.step % self.config.tracking.every_steps == 0:
            self._log(row, record.step)
        every = self.config.evaluation.every_steps
        if every and record.step % every == 0 and record.step < self.num_steps:
            self._evaluate(record.step)

    def _row(self, record: StepRecord) -> dict[str, float]:
        result, seconds, ranks = record.result, record.step_seconds, self.group.world_size
        row = {
            "loss": result.loss,
            "learning_rate": record.learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": result.num_tokens / seconds,
            "tokens_per_second_per_device": result.num_tokens / seconds / ranks,
            "target_tokens_per_second": result.num_target_tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": record.data_seconds,
            "skipped_steps": float(record.skipped_steps),
        }
        peak = peak_tflops(self.group.device)
        if peak is not None:
            length = result.num_tokens / self.config.training.global_batch_size
            achieved = self.shape.flops_per_token(length) * row["tokens_per_second_per_device"] / 1e12
            row["model_flop_utilization"] = achieved / peak
        return row

    def _log(self, row: dict[str, float], step: int) -> None:
        self.directory.append_metrics({"step": step, **row})
        self.tracker.log_metrics(row, step)

    def _save_adapter(self) -> None:
        tensors = self.engine.adapter_tensors()
        base = backbone_settings(self.config) | {"tokenizer": self.config.model.tokenizer}
        self.group.on_main(
            lambda: write_adapter(
                self.directory.adapter,
                self.config.adapter,
                tensors,
                base=base,
                base_fingerprint=self.fingerprint,
            )
        )

    def _finish(self, summary: dict[str, Any], before: Scores | None, after: Scores | None) -> None:
        self.directory.write_summary(summary)
        self.directory.plots.mkdir(exist_ok=True)
        plot_curves(self.directory.read_metrics(), self.directory.plots / "curves.png")
        if self.config.tracking.log_adapter:
            self.tracker.log_directory(self.directory.adapter, "adapter")
        self.tracker.log_directory(self.directory.plots, "plots")
        self.tracker.log_artifact(self.directory.summary_file)
        tracking = self.config.tracking
        uri = store_uri(self.config.run.output_dir, tracking.uri) if tracking.tracker == "mlflow" else None
        if before and after:
            self.console.print_before_after([_before_after(key, before[key], after[key]) for key in before])
        self.console.print_where_to_look(self.directory.path, self.directory.adapter, uri)


def _tracker(config: RunConfig, group: ProcessGroup, console: Console) -> Tracker:
    if config.tracking.tracker == "none" or not group.is_main:
        return NullTracker()
    return mlflow_tracker(
        config.run.output_dir, config.tracking.uri, config.tracking.experiment, console.warn
    )


def _tags(environment: dict[str, Any]) -> dict[str, str]:
    git = environment["git"] or {}
    tags = {f"version.{name}": version for name, version in environment["packages"].items() if version}
    return tags | {f"git.{name}": str(value) for name, value in git.items()}


def _training_summary(records: list[StepRecord], num_ranks: int) -> dict[str, Any]:
    seconds = sum(record.step_seconds for record in records)
    tokens = sum(record.result.num_tokens for record in records)
    targets = sum(record.result.num_target_tokens for record in records)
    return {
        "num_steps": len(records),
        "skipped_steps": records[-1].skipped_steps,
        "first_loss": records[0].result.loss,
        "last_loss": records[-1].result.loss,
        "num_tokens": tokens,
        "num_target_tokens": targets,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_device": tokens / seconds / num_ranks,
        "target_tokens_per_second": targets / seconds,
    }


def _plain(scores: Scores | None) -> dict[str, Any] | None:
    return {length: asdict(score) for length, score in scores.items()} if scores else None


def _before_after(length: str, before: Score, after: Score) -> BeforeAfter:
    return BeforeAfter(
        length if length != OVERALL else "all",
        after.num_examples,
        before.loss,
        after.loss,
        before.exact_match,
        after.exact_match,
    )
