"""One whole run: from a configuration to a run directory with adapter, metrics and summary."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ssmlora_dist.adapters.health import watch_state
from ssmlora_dist.adapters.placement import time_axes
from ssmlora_dist.adapters.state_means import record_states, replaced_states
from ssmlora_dist.batches import Batch
from ssmlora_dist.config.build import backbone_settings, build_backbone, build_store, check_model, meta_model
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import gradient_accumulation_steps
from ssmlora_dist.data import BatchShape, Dataset
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.errors import CheckpointError, DataError
from ssmlora_dist.evaluation.teacher_forced import OVERALL
from ssmlora_dist.progress import Progress, progress
from ssmlora_dist.signals import StopRequested
from ssmlora_dist.tracking import (
    Console,
    RunDirectory,
    RunStatus,
    Tracker,
    environment_record,
    flat_parameters,
)
from ssmlora_dist.training.compute_dtype import settle_compute_dtype
from ssmlora_dist.training.contents import first_start, tokenizer_of
from ssmlora_dist.training.data import RunData
from ssmlora_dist.training.determinism import determinism
from ssmlora_dist.training.evaluation import evaluate
from ssmlora_dist.training.header import adapter_lines, run_header
from ssmlora_dist.training.interrupts import Interrupts, StoppedError
from ssmlora_dist.training.lack_of_memory import REHEARSING_DEVICES, Work, named_lack_of_memory, rehearse
from ssmlora_dist.training.loop import StepRecord, train
from ssmlora_dist.training.metrics import memory_gib, peak_memory_gib, usable_memory_bytes
from ssmlora_dist.training.planner import planned_text, settle_memory
from ssmlora_dist.training.probe import probe_places
from ssmlora_dist.training.report import (
    Scores,
    environment_tags,
    plain_scores,
    score_row,
    scores_from_plain,
    state_row,
    step_row,
    tracker_of,
)
from ssmlora_dist.training.results import ResultWriter
from ssmlora_dist.training.resume_point import (
    NEVER,
    ResumePoint,
    base_of,
    check_settings,
    completion,
    find_resume_point,
    settle_places,
)
from ssmlora_dist.training.saving import Saver, checkpoint_text
from ssmlora_dist.training.schedule import learning_rate
from ssmlora_dist.training.task_evaluation import TasksInTraining
from ssmlora_dist.training.topology import ParallelDims, build_engine, parallel_dims_of, plan_stages
from ssmlora_dist.training.totals import Totals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Training examples over which states are averaged, to know what they are worth.
STATE_EXAMPLES = 8


def run_training(
    config: RunConfig, context: DistributedContext, console: Console, resume: str = NEVER
) -> None:
    """Trains an adapter as configured; every rank calls it, rank 0 writes and shows.

    Args:
        config: of the run.
        context: its processes.
        console: of rank 0.
        resume: `never`, `auto` or a directory: see `find_resume_point`.

    Raises:
        SSMLoRAError: bad input, found before the backbone is loaded where that is possible, or training that
            failed; the run directory and the tracker then say so.
        StoppedError: a signal has stopped it.
    """
    directory = RunDirectory(config.run.output_dir / config.run.name)
    try:
        with determinism(config, context.device):
            _train(config, context, console, resume, directory)
    finally:
        directory.release()


def _train(
    config: RunConfig, context: DistributedContext, console: Console, resume: str, directory: RunDirectory
) -> None:
    """What `run_training` does, in a run directory that somebody else releases."""
    resume_point: ResumePoint = context.on_main(lambda: find_resume_point(resume, directory, console.warn))
    config = settle_compute_dtype(config, context, console, kept=resume_point.compute_dtype)
    tracker = tracker_of(config, context, console, resume_point)
    config = settle_places(resume_point, config)
    check_settings(resume_point, config)
    check_model(config, context.device.type)
    if config.training.is_unsettled:
        memory = -context.max([-usable_memory_bytes(context.device)])[0]
        config, chosen = settle_memory(config, context.world_size, memory)
        console.message(chosen)
    began: str = context.share(first_start(resume_point))
    tokenizer, contents = tokenizer_of(config, resume_point, began, console.warn)
    dims = parallel_dims_of(config, context)
    data = RunData(config, tokenizer, context, dims, resume_point, console.warn)
    contents |= data.contents
    tasks = TasksInTraining(config, tokenizer, context, data.endings)
    parts = (tracker, directory, resume_point, tokenizer, contents, dims, data, tasks)
    run = _Run(config, context, console, *parts)
    complete: str | None = context.on_main(lambda: completion(resume_point, directory, data.num_steps))
    if complete is not None:
        console.message(complete)
        return
    if context.is_main:
        header = run_header(
            config,
            context.device,
            context.world_size,
            num_steps=data.num_steps,
            num_examples=data.num_examples,
            num_rows=data.num_rows,
            accounts=[*data.accounts(), *tasks.notes],
            resume_point=resume_point,
        )
        console.message(header)
    planned = partial(planned_text, config, context.world_size)
    named = partial(named_lack_of_memory, config, context, run.work, planned=planned)
    with named(lambda: checkpoint_text(resume_point.path)):
        run.build()
    # Only now: what a run refused for bad input would leave behind would block the next one of its name.
    if not resume_point.in_place:
        context.on_main(directory.claim)
    context.when_a_rank_is_lost(lambda: tracker.finish("FAILED"))
    with Interrupts(context, config.checkpoint.grace_seconds) as interrupts:
        status: RunStatus = "FAILED"
        try:
            run.begin()
            with named(run.saver.last_good_here):
                run.execute(interrupts)
            status = "FINISHED"
        except StoppedError:
            status = "KILLED"
            raise
        finally:
            context.about_to_stop()
            data.close()
            with progress("completing the record of the run"):
                tracker.finish(status)
            if status == "KILLED":
                # A launcher ends the others once one has ended: none does before rank 0 has said all.
                context.share(None)


@dataclass
class _Run:
    """The parts of one run, and its phases in order."""

    config: RunConfig
    context: DistributedContext
    console: Console
    tracker: Tracker
    directory: RunDirectory
    resume_point: ResumePoint
    tokenizer: PreTrainedTokenizerBase
    contents: dict[str, Any]
    dims: ParallelDims
    data: RunData
    tasks: TasksInTraining

    def __post_init__(self) -> None:
        self.started = time.perf_counter()
        self.num_steps = self.data.num_steps
        self.store = build_store(self.config)
        checkpoint = self.resume_point.checkpoint
        saved = checkpoint.progress if checkpoint else {"totals": {}, "wall_seconds": 0.0, "before": None}
        self.totals = Totals(**saved["totals"])
        self.before = scores_from_plain(saved["before"]) if self.data.compares else None
        self.seconds_before: float = saved["wall_seconds"]
        self.warned_of_metrics = False
        self.work = Work()

    def begin(self) -> None:
        """Writes down what is going to be run, and whence."""
        if self.context.is_main:
            self.directory.cut_metrics(self.resume_point.step if self.resume_point.checkpoint else -1)
            resolved = self.config.model_dump(mode="json", by_alias=True)
            self.directory.write_config(resolved)
        if self.resume_point.checkpoint and not self.resume_point.in_place:
            # Without one of its own this run, continued, would begin anew.
            self._save(self.resume_point.step)
            self.saver.finish()
        if self.context.is_main:
            tags = environment_tags(environment_record()) | self.config.tracking.tags
            with progress("beginning the record of the run"):
                self.tracker.start(self.config.run.name, flat_parameters(resolved), tags)
            self.tracker.log_metrics(self.data.metrics(), self.resume_point.step)

    def execute(self, interrupts: Interrupts) -> None:
        """Evaluate, train, save, evaluate, summarise.

        Raises:
            StoppedError: a signal asked for it.
        """
        self.interrupts = interrupts
        try:
            self._execute()
        except StopRequested as request:
            raise self._stopped(request.signum) from None
        except DataError as error:
            # Of a stream, and on all ranks alike, as they are about to begin a step.
            if self.totals.num_steps > self.saver.last_step:
                self._save(self.totals.num_steps)
            again = "once that is mended, go on with --resume auto"
            raise DataError(f"{error}; {self.saver.finish()}; {again}") from None

    def _execute(self) -> None:
        if self.context.device.type in REHEARSING_DEVICES:
            num_micro_batches = gradient_accumulation_steps(self.config, self.context.world_size)
            # Of a pipeline as many as are under way at once.
            batches = [self.data.longest_micro_batch()] * min(self.dims.num_stages, num_micro_batches)
            rehearse(self.engine.rehearse, batches, self.context.device, self.work)
        if self.before is None and self.resume_point.step == 0:
            self.before = self._evaluate(step=0)
        if self.resume_point.step == 0:
            self._answer_tasks(0)
        # From the first step on: its lines tell what becomes of the loss.
        with progress("training", self.num_steps, initial=self.resume_point.step, quiet_seconds=0) as shown:
            train(
                self.engine,
                self._micro_batches,
                self._learning_rate,
                num_steps=self.num_steps,
                max_nonfinite_steps=self.config.training.max_nonfinite_steps,
                on_step=partial(self._on_step, shown),
                first_step=self.resume_point.step,
                skipped_steps=self.totals.skipped_steps,
                check=self.interrupts.check,
                last_good=self.saver.finish,
            )
        # Before anything else can go wrong.
        tensors = self.engine.adapter_tensors()
        self.context.on_main(lambda: self.results.save_adapter(tensors, self.base, self.fingerprint))
        if self.config.checkpoint.every_steps and self.saver.last_step < self.num_steps:
            self._save(self.num_steps)
        before, after = self.before, self._evaluate(step=self.num_steps)
        if after and self.saver.is_best(after[OVERALL].loss):
            self._save(self.num_steps, after[OVERALL].loss)
        self.saver.finish()
        without_states = self._evaluate_without_states(after)
        summary = {
            **self.totals.summary(self.context.world_size),
            "compute_dtype": self.config.model.compute_dtype,
            "training_seconds": self.totals.step_seconds,
            "wall_seconds": self._wall_seconds(),
            "loaded_memory_gib": self.loaded_memory_gib,
            "peak_memory_gib": peak_memory_gib(self.context),
            "num_trainable_parameters": self.num_trainable,
            "evaluation": {
                "before": plain_scores(before),
                "after": plain_scores(after),
                "without_states": plain_scores(without_states),
            },
            "data": {
                "train": asdict(self.data.report),
                "validation": asdict(self.data.validation.report) if self.data.validation else None,
                "revisions": self.contents["revisions"],
            },
            "tracking": self.store.record() if self.store else None,
            "environment": environment_record(),
        }
        if self.context.is_main:
            self.tracker.log_metrics(self.data.metrics(), self.num_steps)
            self.results.finish(summary, before, after, without_states)

    def _micro_batches(self, step: int) -> list[Batch]:
        batches = self.data.micro_batches(step)
        self.work.begin(f"training, step {step + 1}", batches)
        return batches

    def build(self) -> None:
        """Loads the backbone, adapts it and hands it to the engine."""
        # By rank 0 alone, as a part of every tensor is read.
        fingerprint: str = self.context.on_main(partial(base_of, self.config, self.resume_point))
        plan = None
        if self.dims.num_stages > 1:
            memory = -self.context.max([-usable_memory_bytes(self.context.device)])[0]
            plan = plan_stages(self.config, self.data.sample, self.dims, memory)
            self.console.message(plan.table)
        checkpoint, warn = self.resume_point.checkpoint, self.console.warn
        backbone = self._probed_backbone() if self.config.adapter.is_unprobed else None
        built = build_engine(self.config, self.context, self.dims, plan, checkpoint, warn, backbone)
        self.engine = built.engine
        self.loaded_memory_gib = memory_gib(self.context)
        self.shape, self.adapter = built.shape, built.adapter
        num_replicas = self.context.world_size // self.dims.num_stages
        self.num_trainable = int(self.context.sum([built.num_trainable])[0]) // num_replicas
        self.base = backbone_settings(self.config) | self.data.endings
        self.base["tokenizer"] = self.config.model.tokenizer
        self.fingerprint = fingerprint
        parts = (self.base, fingerprint, self.contents, self.resume_point, self.console.warn)
        checkpoints, compares = self.directory.checkpoints, self.data.compares
        self.saver = Saver(self.config, self.context, self.engine, checkpoints, *parts, compares=compares)
        self.results = ResultWriter(
            self.config, self.directory, self.tracker, self.store, self.console, self.saver.last_good
        )

    def _probed_backbone(self) -> PreTrainedModel:
        """The backbone; its places are chosen on the way."""
        backbone = build_backbone(self.config, self.context.device)
        batches = self.data.probe_batches(self.config.adapter.probe_batches)
        self.config = self.config.with_places(probe_places(self.config, backbone, batches, self.context))
        self.console.message("\n".join(adapter_lines(self.config, meta_model(self.config))))
        return backbone

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
        if self.data.validation is None:
            return None
        description = f"evaluation after step {step}" if step else "evaluation before training"
        with watch_state(self.engine.module, time_axes(self.adapter), self.context.device) as health:
            scores = self._scores(self.data.validation, description)
        row = health.metrics(self.context.sum(health.sums.tolist()))
        if self.context.is_main:
            self._log(row | score_row(scores), step)
        return scores

    def _evaluate_without_states(self, after: Scores | None) -> Scores | None:
        """The last evaluation again, every state replaced by its mean over training examples."""
        if self.data.validation is None or after is None or not time_axes(self.adapter):
            return None
        module, examples = self.engine.module, self.data.sample.examples[:STATE_EXAMPLES]
        with record_states(module) as means:
            # One by one: no padding counts. On every rank the same, so that the means are.
            self._scores(replace(self.data.sample, examples=examples), "recording states", is_shared=False)
        with replaced_states(module, means):
            scores = self._scores(self.data.validation, "evaluation without states")
        if self.context.is_main:
            self._log(state_row(after, scores), self.num_steps)
        return scores

    def _scores(self, dataset: Dataset, description: str, *, is_shared: bool = True) -> Scores:
        """Of a data set that the replicas share, or that each of them has to itself, row by row."""
        dims = self.dims
        rows = self.config.evaluation.micro_batch_size
        shape = dims.batch_shape(rows * dims.data_parallel_size, rows, self.tokenizer.pad_token_id)
        return evaluate(
            lambda batches: self.engine.score(self._checked(batches, description)),
            dataset,
            shape=shape if is_shared else BatchShape(1, 1, 0, 1, self.tokenizer.pad_token_id),
            # Every stage has the scores of its replica, and every rank that shares rows.
            sum_over_ranks=lambda values: [v / dims.num_copies for v in self.context.sum(values)],
            description=description,
        )

    def _answer_tasks(self, step: int) -> None:
        if self.tasks.is_due(step, self.num_steps):
            self.work.begin(f"answering tasks after step {step}")
            metrics = self.tasks.answer(self.engine.module.model)
            if self.context.is_main:
                self._log(metrics, step)

    def _checked(self, batches: Iterable[Batch], description: str) -> Iterator[Batch]:
        for batch in batches:
            self.work.begin(description, [batch])
            # Between stages it would hold up the pipeline.
            if self.dims.num_stages == 1:
                self.interrupts.check()
            yield batch

    def _on_step(self, shown: Progress, record: StepRecord) -> None:
        self.totals.add(record)
        row = step_row(record, self.context, self.shape, self.config.training.global_batch_size)
        speed = row["tokens_per_second"]
        shown.update(record.step, f"loss {record.result.loss:.4f}", f"{speed:,.0f} tokens/s")
        if self.context.is_main and record.step % self.config.tracking.every_steps == 0:
            self._log(row, record.step)
        every = self.config.evaluation.every_steps
        loss = None
        if every and record.step % every == 0 and record.step < self.num_steps:
            scores = self._evaluate(record.step)
            loss = scores[OVERALL].loss if scores else None
        self._answer_tasks(record.step)
        if self.saver.is_due(record.step, loss) or self.interrupts.save_requested:
            self.interrupts.save_requested = False
            self._save(record.step, loss)

    def _save(self, step: int, validation_loss: float | None = None) -> None:
        started = time.perf_counter()
        train_state = {
            "totals": self.totals.plain(),
            "wall_seconds": self._wall_seconds(),
            "before": plain_scores(self.before),
            "data_position": self.data.position(step) if self.context.is_main else None,
            "tracker_run_id": self.tracker.run_id,
        }
        self.saver.save(step, train_state, validation_loss)
        if self.context.is_main:
            self._log({"checkpoint_seconds": time.perf_counter() - started}, step)

    def _stopped(self, signum: int) -> StoppedError:
        step = self.totals.num_steps
        if step > self.saver.last_step:
            self._save(step)
        again = "go on with --resume auto" if self.saver.last_step == step > 0 else "nothing was trained yet"
        at = f"{signal.Signals(signum).name} after step {step} of {self.num_steps}"
        return StoppedError(f"by {at}; {self.saver.finish()}; {again}", signum)

    def _wall_seconds(self) -> float:
        """Since the run began, the time aside in which it stood still."""
        return self.seconds_before + time.perf_counter() - self.started

    def _log(self, row: dict[str, float], step: int) -> None:
        try:
            self.directory.append_metrics({"step": step, **row})
        except CheckpointError as error:
            if not self.warned_of_metrics:
                self.console.warn(f"{error}; training goes on, and what is missing is written once it can be")
            self.warned_of_metrics = True
        self.tracker.log_metrics(row, step)
