"""A run that runs out of memory: what it says, on which rank, and that its longest rows come first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from ssmlora_dist.batches import Batch
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.distributed.context import DistributedContext, start_process_group, stop_process_group
from ssmlora_dist.distributed.engine import DataParallelEngine
from ssmlora_dist.errors import EXIT_TRAINING_FAILED, TrainingError
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.ranks import VARIABLES
from ssmlora_dist.sweep.outcome import outcome_of
from ssmlora_dist.tracking import Console
from ssmlora_dist.training import run
from ssmlora_dist.training.lack_of_memory import Work, named_lack_of_memory, rehearse, remedies
from ssmlora_dist.training.run import run_training
from ssmlora_dist.training.saving import Saver

from ..launch.processes import DEBUG_TINY

GIB = 2**30
# As torch 2.13 says it.
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
    "1.00 GiB is free. Process 7 has 78.1 GiB memory in use."
)
ON_GPU = DistributedContext(3, 8, 3, torch.device("cuda", 3))
ON_CPU = DistributedContext(0, 1, 0, torch.device("cpu"))


def batch(rows: int, tokens: int) -> Batch:
    return Batch.of(torch.ones(rows, tokens, dtype=torch.int64), input_ids=torch.ones(rows, tokens))


def fail(error: BaseException, context: DistributedContext, work: Work, *overrides: str) -> NoReturn:
    config = load_config(DEBUG_TINY, overrides, world_size=1, device_type="cpu")
    with named_lack_of_memory(config, context, work, lambda: "the last good checkpoint is c/step-3"):
        raise error
    raise AssertionError


def test_it_says_what_there_was_what_would_need_less_and_what_is_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (GIB, 79 * GIB))
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 70 * GIB)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 77 * GIB)
    work = Work()
    work.begin("training, step 4", [batch(2, 8), batch(2, 64), batch(2, 16)])
    with pytest.raises(TrainingError) as caught:
        fail(torch.OutOfMemoryError(CUDA), ON_GPU, work, "training.micro_batch_size=4", "data.max_length=300")
    said = str(caught.value)
    assert caught.value.exit_code == EXIT_TRAINING_FAILED == 3
    assert said.startswith(
        "out of memory on cuda:3 while training, step 4, in a micro-batch of 2 x 64 tokens: 70.00 GiB "
        "allocated, 77.00 GiB reserved by torch, 1.00 GiB free of 79.00 GiB (CUDA out of memory. Tried to "
        "allocate 2.50 GiB). To need less, lower training.micro_batch_size (4), "
    )
    assert "data.max_length (300)" in said
    assert "training.mlp_tile_size=1024" in said
    assert said.endswith("; the last good checkpoint is c/step-3")
    assert "\n" not in said
    # What a sweep takes it for.
    assert outcome_of(3, f"error on rank 3: {said}\n")[0] == "out_of_memory"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_other_allocators_say_it_otherwise(error: Exception) -> None:
    with pytest.raises(TrainingError, match=r"out of memory on cpu while loading the model: .* GiB resident"):
        fail(error, ON_CPU, Work())


@pytest.mark.parametrize("error", [ValueError("odd"), TrainingError("no out of memory of ours")])
def test_anything_else_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        fail(error, ON_CPU, Work())
    assert caught.value is error


def test_only_what_helps_is_named() -> None:
    config = load_config(DEBUG_TINY, ["quantization.mode=nf4"], world_size=1, device_type="cpu")
    assert remedies(config, 1, Work()) == ["use a device with more memory"]
    assert "parallel.zero_stage=3" in remedies(config, 2, Work())[0]
    spared = [
        "training.mlp_tile_size=64",
        "training.offload_checkpoints=true",
        "training.gradient_checkpointing=true",
    ]
    config = load_config(DEBUG_TINY, ["quantization.mode=nf4", *spared], world_size=1, device_type="cpu")
    lower, *others = remedies(config, 1, Work("training, step 1", (1, 8)))
    assert "training.mlp_tile_size (64)" in lower
    assert others == ["use a device with more memory"]


def test_what_is_drawn_later_stays_as_it_was() -> None:
    work, tried = Work(), []
    before = torch.get_rng_state()

    def draw(batches: Any) -> None:
        tried.extend(batches)
        torch.rand(3)

    longest = [batch(1, 9)]
    rehearse(draw, longest, torch.device("cpu"), work)
    assert tried == longest
    assert torch.equal(torch.get_rng_state(), before)
    assert str(work).endswith("before the first step, in a micro-batch of 1 x 9 tokens")


def test_a_rank_names_the_checkpoint_that_rank_0_has_told_it_of() -> None:
    saver: Any = object.__new__(Saver)
    for noted, said in ((None, "no checkpoint has been saved"), ("c/7", "a good checkpoint is c/7")):
        watch: Any = SimpleNamespace(last_checkpoint=noted)
        saver._context = DistributedContext(1, 2, 1, torch.device("cpu"), watch)
        assert saver.last_good_here() == said


RUN = (
    "run.name=run",
    "model.config.num_hidden_layers=2",
    "training.max_steps=3",
    "training.global_batch_size=2",
    "training.warmup_steps=0",
    "adapter.dropout=0.2",
    "checkpoint.every_steps=1",
    "tracking.tracker=none",
    "data.validation=null",
    "evaluation.every_steps=null",
)


@pytest.fixture(scope="module")
def context() -> Iterator[DistributedContext]:
    with pytest.MonkeyPatch.context() as environment:
        for name in VARIABLES:
            # So that what is set is taken back.
            environment.setenv(name, "")
        yield start_process_group(60)
        stop_process_group()


def losses(context: DistributedContext, directory: Path) -> list[float]:
    """Of a run, step by step."""
    config = load_config(DEBUG_TINY, [*RUN, f"run.output_dir={directory}"], device_type="cpu")
    run_training(config, context, Console(enabled=False))
    rows = map(json.loads, (directory / "run" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_the_longest_rows_come_before_the_first_step_and_change_no_number(
    context: DistributedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    rehearses = DataParallelEngine.rehearse

    def watched(engine: DataParallelEngine, batches: list[Batch]) -> None:
        seen.extend(batch.shape[1] for batch in batches)
        rehearses(engine, batches)

    monkeypatch.setattr(DataParallelEngine, "rehearse", watched)
    without = losses(context, tmp_path / "without")
    assert seen == []
    monkeypatch.setattr(run, "REHEARSING_DEVICES", {"cpu"})
    assert losses(context, tmp_path / "with") == without
    assert len(without) == 3
    assert len(seen) == 1


def test_a_run_ends_with_its_last_checkpoint(
    context: DistributedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever allocates: the message is that of the step in which it was."""
    forward, calls = CausalLMLoss.forward, []

    def fails_in_the_third_step(module: CausalLMLoss, batch: Batch) -> Any:
        calls.append(batch.shape)
        if len(calls) == 5:
            raise torch.OutOfMemoryError(CUDA)
        return forward(module, batch)

    monkeypatch.setattr(CausalLMLoss, "forward", fails_in_the_third_step)
    with pytest.raises(TrainingError) as caught:
        losses(context, tmp_path)
    said = str(caught.value)
    assert "while training, step 3, in a micro-batch of 1 x " in said
    assert said.endswith(f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}")
