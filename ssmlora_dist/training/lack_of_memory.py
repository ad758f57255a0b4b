"""What a run that needs more memory than there is ends with: one message, which says what would need less."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ssmlora_dist.batches import Batch
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.errors import OUT_OF_MEMORY, SSMLoRAError, TrainingError
from ssmlora_dist.progress import progress
from ssmlora_dist.training.metrics import memory_text

# Where memory is short, and where a run of hours would meet its longest rows late.
REHEARSING_DEVICES = {"cuda"}
TILE_SIZE = 1024


@dataclass
class Work:
    """What a rank is doing.

    Attributes:
        description: of it.
        shape: rows and tokens of its largest micro-batch; None where there is none, as in loading.
    """

    description: str = "loading the model"
    shape: tuple[int, int] | None = None

    def begin(self, description: str, batches: Sequence[Batch] = ()) -> None:
        """Says what is done from now on."""
        self.description = description
        self.shape = max((batch.shape for batch in batches), key=math.prod, default=None)

    def __str__(self) -> str:
        if self.shape is None:
            return self.description
        rows, tokens = self.shape
        return f"{self.description}, in a micro-batch of {rows} x {tokens} tokens"


def rehearse(
    engine_rehearses: Callable[[Sequence[Batch]], None],
    longest: Sequence[Batch],
    device: torch.device,
    work: Work,
) -> None:
    """Computes the longest rows once: what does not fit shows now, and not when their turn comes.

    Nothing is updated, and what is drawn at random later stays as it was.

    Args:
        engine_rehearses: that of a topology's engine; every rank calls it.
        longest: micro-batches of the longest rows.
        device: of this rank.
        work: is told.
    """
    work.begin("trying the longest rows before the first step", longest)
    devices = [device] if device.type == "cuda" else []
    with progress("trying the longest rows"), torch.random.fork_rng(devices):
        engine_rehearses(longest)


@contextmanager
def named_lack_of_memory(
    config: RunConfig,
    context: DistributedContext,
    work: Work,
    last_good: Callable[[], str],
    planned: Callable[[], str] | None = None,
) -> Iterator[None]:
    """Makes of an allocation that fails a message with what there is, and what would need less.

    Args:
        config: of the run.
        context: its processes, of which this one may be the only one that runs out of memory.
        work: that is done meanwhile.
        last_good: says on this rank alone where the last good checkpoint is.
        planned: says what the work was planned to hold; None: it was not planned.

    Raises:
        TrainingError: memory has run out.
    """
    try:
        yield
        return
    except Exception as error:
        is_one = OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")
        if isinstance(error, SSMLoRAError) or is_one is None:
            raise
        # Here, where what the work had allocated is still held.
        memory = memory_text(context.device)
        asked = ". ".join(" ".join(str(error).split()).split(". ")[:2])
    raise TrainingError(
        f"out of memory on {context.device} while {work}: {memory} ({asked})"
        f"{f'; planned were {planned()}' if planned else ''}. To need less, "
        f"{'; '.join(remedies(config, context.world_size, work))}; {last_good()}"
    )


def remedies(config: RunConfig, world_size: int, work: Work) -> list[str]:
    """What would need less memory for some work, by keys of the configuration with what they are now."""
    training, spared, parallel = config.training, config.training.spared, config.parallel
    is_splittable = world_size > 1 and parallel.pipeline_stages == 1
    lower, settings = [], []
    if work.shape is not None:
        lower = [
            ("training.micro_batch_size", training.micro_batch_size),
            ("evaluation.micro_batch_size", config.evaluation.micro_batch_size),
            ("data.max_length", config.data.max_length),
            ("training.mlp_tile_size", spared.mlp_tile_size or 1),
            ("training.loss_chunk_size", training.loss_chunk_size),
            ("training.layers_per_checkpoint", spared.layers_per_checkpoint),
        ]
        settings = [
            ("training.gradient_checkpointing=true", not training.gradient_checkpointing),
            (f"training.mlp_tile_size={TILE_SIZE}", spared.mlp_tile_size is None),
            ("training.offload_checkpoints=true", not spared.offload_checkpoints),
        ]
    settings += [
        ("quantization.mode=nf4", config.quantization.mode in ("none", "int8")),
        ("parallel.zero_stage=3", is_splittable and parallel.zero_stage < 3),
        ("parallel.pipeline_stages=2", is_splittable),
    ]
    listed = ", ".join(f"{key} ({value})" for key, value in lower if value > 1)
    wanted = ", ".join(setting for setting, helps in settings if helps)
    found = [f"lower {listed}"] if listed else []
    return [*found, *([f"set {wanted}"] if wanted else []), "use a device with more memory"]
