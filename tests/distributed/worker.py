"""One rank of several things in a row: `python -m tests.distributed.worker`, with a launcher's variables set.

They share one start of the interpreter, which costs more than any of them. What a rank found is written to
`rank-R-of-N.json` in the working directory, where the run directories are too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ssmlora_dist.batches import Batch
from ssmlora_dist.config.loading import load_config
from ssmlora_dist.distributed.context import DistributedContext, start_process_group, stop_process_group
from ssmlora_dist.distributed.ds_config import deepspeed_config
from ssmlora_dist.distributed.engine import DataParallelEngine
from ssmlora_dist.distributed.loading import swap_rows
from ssmlora_dist.distributed.loss_scale import LossScale
from ssmlora_dist.errors import CheckpointError, SSMLoRAError
from ssmlora_dist.models import loading
from ssmlora_dist.tracking import Console, quiet_libraries
from ssmlora_dist.training import resume_point, run
from ssmlora_dist.training.lack_of_memory import REHEARSING_DEVICES

from ..launch.preloaded import hide_plots
from ..launch.processes import DEBUG_TINY
from .jobs import COMMON, JOBS, POISONS, STAGES, fits, result_file, run_name

TIMEOUT_SECONDS = 120


def main() -> None:
    quiet_libraries()
    hide_plots()
    context = start_process_group(TIMEOUT_SECONDS)
    try:
        found = {
            "collectives": collectives(context),
            "swapped": swap_halves(context),
            **train_all(context),
            "skipping": {
                f"zero {stage}, {poison}": steps_with_poison(context, stage, poison)
                for stage in STAGES
                for poison in POISONS
            },
        }
    finally:
        stop_process_group()
    Path(result_file(context.rank, context.world_size)).write_text(json.dumps(found))


def train_all(context: DistributedContext) -> dict[str, Any]:
    """Runs all jobs that fit, and one of them again: what this raises, and what was seen of their loading."""
    message = ""
    whole_parts = {}
    if context.world_size > 1:
        # As on GPUs; nothing changes by it.
        REHEARSING_DEVICES.add("cpu")
    names = [name for name in JOBS if fits(name, context.world_size)]
    counted = mock.Mock(wraps=resume_point.build_fingerprint)
    with mock.patch.object(resume_point, "build_fingerprint", counted):
        for name in [*names, names[0]]:
            own = f"run.name={run_name(name, context.world_size)}"
            config = load_config(DEBUG_TINY, [own, *COMMON, *JOBS[name]], device_type="cpu")
            try:
                with watched_loading(context) as whole_parts[name]:
                    run.run_training(config, context, Console(enabled=False))
            except SSMLoRAError as error:
                message = str(error)
    return {"trained twice": message, "whole parts": whole_parts, "fingerprints": counted.call_count}


@contextmanager
def watched_loading(context: DistributedContext) -> Iterator[list[int]]:
    """As each part of a model is filled, how many of those before it are not shards; in a list that grows."""
    parts: list[nn.Module] = []
    whole_before: list[int] = []
    fill = loading.fill

    def watched(part: nn.Module, *arguments: Any, **settings: Any) -> None:
        whole_before.append(sum(not is_sharded(before, context.world_size) for before in parts))
        fill(part, *arguments, **settings)
        parts.append(part)

    with mock.patch.object(loading, "fill", watched):
        yield whole_before


def is_sharded(part: nn.Module, num_ranks: int) -> bool:
    """Whether of every parameter this rank holds nothing but its shard."""
    return all(
        hasattr(parameter, "ds_tensor")
        and parameter.numel() == 0
        and parameter.ds_tensor.numel() == -(-parameter.ds_numel // num_ranks)
        for parameter in part.parameters()
    )


def swap_halves(context: DistributedContext) -> bool:
    """Whether two ranks that each hold one half of a table have the whole table after they swapped."""
    if context.world_size != 2:
        return True
    # So large that neither can be sent before the other side receives.
    table = torch.arange(3 * 2**20, dtype=torch.float32).view(-1, 2).to(torch.bfloat16)
    middle = len(table) // 2 - 1
    mine = torch.zeros_like(table)
    halves = (mine[:middle], mine[middle:])
    halves[context.rank].copy_((table[:middle], table[middle:])[context.rank])
    swap_rows(1 - context.rank, halves[context.rank], halves[1 - context.rank])
    return torch.equal(mine, table)


def collectives(context: DistributedContext) -> dict[str, Any]:
    """What the context's own collectives give on this rank."""

    def refuse() -> None:
        raise CheckpointError(f"refused on rank {context.rank}")

    try:
        context.on_main(refuse)
    except CheckpointError as error:
        refused = str(error)
    ran: list[int] = []
    context.on_main(lambda: ran.append(context.rank))
    # As if every rank were a node.
    apart = replace(context, local_rank=0)

    def refuse_last() -> None:
        if context.rank == context.world_size - 1:
            refuse()

    try:
        apart.on_each_node(refuse_last)
    except CheckpointError as error:
        refused_by_last = str(error)
    return {
        "of node": context.on_each_node(lambda: context.rank),
        "of own node": apart.on_each_node(lambda: context.rank),
        "refused by last": refused_by_last,
        "collected": context.collect(lambda: 10 * context.rank, range(context.world_size)),
        "collected of last": context.collect(lambda: 10 * context.rank, [context.world_size - 1]),
        "sum": context.sum([1.0, 0.25 * context.rank]),
        "max": context.max([1.0, 0.25 * context.rank]),
        "refused": refused,
        "ran": ran,
    }


class SquaredOutputs(nn.Module):
    """Sum of the squared outputs of one linear layer, and of whatever is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(1.0, 7.0).view(2, 3))

    def forward(self, batch: Batch) -> Tensor:
        """Of `inputs` [B,S,3] and `added` [B] a scalar; the targets are only counted."""
        return self.linear(batch.inputs["inputs"]).square().sum() + batch.inputs["added"].sum()


def steps_with_poison(context: DistributedContext, zero_stage: int, poison: str) -> dict[str, Any]:
    """A good step, a step whose last micro-batch on the last rank is poisoned, and a good step.

    Args:
        context: the ranks.
        zero_stage: 0 to 3.
        poison: `no poison` leaves the second step out; `gradients` makes them and the loss not-a-number,
            `loss` adds infinity to the loss alone; `overflow`, in which the loss is scaled, makes them
            infinite for that scale alone; `rehearsed` rehearses it and a step before
            the first one, and makes neither.
    """
    model = SquaredOutputs()
    parameters = dict(model.named_parameters())
    engine = DataParallelEngine(
        model,
        parameters,
        torch.optim.AdamW(parameters.values(), lr=0.1),
        deepspeed_config(
            zero_stage=zero_stage,
            micro_batch_size=1,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            num_trained=6,
        ),
        context,
        max_grad_norm=1.0,
        loss_scale=LossScale() if poison == "overflow" else None,
    )
    found: dict[str, Any] = {"skipped": [], "grad_norm": [], "weight": [], "loss_scale": [], "halved": []}
    for poisoned in (False, False) if poison == "no poison" else (False, True, False):
        batches = [_micro_batch(context.rank, index) for index in range(2)]
        if poison == "rehearsed":
            engine.rehearse(batches[:1])
            if poisoned:
                continue
        if poisoned and context.rank == context.world_size - 1:
            key, value = {
                "gradients": ("inputs", torch.nan),
                "loss": ("added", torch.inf),
                "overflow": ("inputs", 1e17),
            }[poison]
            batches[-1].inputs[key][0] = value
        result = engine.train_step(batches, learning_rate=0.1)
        found["skipped"].append(result.skipped)
        found["grad_norm"].append(result.grad_norm)
        found["loss_scale"].append(result.loss_scale)
        found["halved"].append(result.scale_halved)
        weight = context.share(engine.adapter_tensors())["linear.weight"]
        found["weight"].append(weight.flatten().tolist())
    return found


def _micro_batch(rank: int, index: int) -> Batch:
    generator = torch.Generator().manual_seed(10 * rank + index)
    inputs = torch.randn(1, 4, 3, generator=generator)
    return Batch.of(torch.ones(1, 4, dtype=torch.int64), inputs=inputs, added=torch.zeros(1))


if __name__ == "__main__":
    main()
