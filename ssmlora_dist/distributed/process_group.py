"""The processes of a run: how they find each other, and small collectives over them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ssmlora_dist.errors import SSMLoRAError, TrainingError


@dataclass(frozen=True)
class ProcessGroup:
    """This process among the run's processes.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
        local_rank: index of this process on its node; the index of its GPU.
        device: where this process computes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints, tracks and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums `values` over all ranks, in float64 on CPU and CUDA alike."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over all ranks."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [float(value) for value in largest.tolist()]

    def on_main(self, action: Callable[[], object]) -> None:
        """Runs `action` on rank 0 while the others wait; its `SSMLoRAError` is raised on every rank."""
        outcome: list[SSMLoRAError | None] = [None]
        if self.is_main:
            try:
                action()
            except SSMLoRAError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise outcome[0]


def world_size_from_environment() -> int:
    """Number of processes that the launcher has started: 1 under plain python."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_process_group(timeout_seconds: int, verbose: bool = False) -> ProcessGroup:
    """Joins the processes started by the DeepSpeed launcher, torchrun, or a plain python command.

    Args:
        timeout_seconds: after which a collective that a rank never joins is an error.
        verbose: shows what DeepSpeed says while it starts.

    Raises:
        TrainingError: when the processes cannot find each other.
    """
    import deepspeed

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(_free_port()))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    # DeepSpeed would compile shared-memory collectives for CPUs at the first run: a minute, and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds), verbose=verbose
        )
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the processes of this run could not connect ({error}); check that MASTER_ADDR and MASTER_PORT "
            "are reachable and that no other run uses the port (deepspeed --master_port N)"
        ) from error
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return ProcessGroup(dist.get_rank(), dist.get_world_size(), local_rank, device)


def stop_process_group() -> None:
    """Ends the process group; without it a gloo process aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
