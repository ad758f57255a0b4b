"""The processes of a run: how they find each other, and small collectives over them.

What is agreed on lies in host memory and travels from host to host: no rank waits for its device to tell the
others a number.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions have the default group at the time of its import as a default argument. Imported in the course
# of a run, by whomever, it would hold that group, whose threads then outlive `stop_process_group` and can
# abort the process as it exits.
import torch.distributed.nn.functional

from ssmlora_dist.devices import device_type
from ssmlora_dist.distributed.liveness import Peer, PeerWatch, meet
from ssmlora_dist.errors import ConfigError, SSMLoRAError, TrainingError
from ssmlora_dist.last_words import show_error
from ssmlora_dist.progress import progress
from ssmlora_dist.ranks import VARIABLES, LaunchEnvironment, read_launch_environment

LONGEST_SILENCE_SECONDS = 60.0
# For what takes as long as it takes; that a rank is lost is noticed otherwise.
PATIENCE = timedelta(days=7)

# As of torch's own process group, there is one of each in a process. The group for host memory; None: torch's
# own is of that kind.
_watch: PeerWatch | None = None
_host: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class DistributedContext:
    """This process among the run's processes.

    Attributes:
        rank: index of this process.
        world_size: number of processes.
        local_rank: index of this process on its node; of its GPU too, unless it sees that one alone.
        device: where this process computes.
        watch: of the other ranks; None where there are none, or where they cannot be watched.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    watch: PeerWatch | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints, tracks and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums `values` over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=_host)
        return [float(value) for value in total.tolist()]

    def max(self, values: Sequence[float]) -> list[float]:
        """Largest of each value over all ranks."""
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_host)
        return [float(value) for value in largest.tolist()]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 while the others wait; every rank gets its result or its `SSMLoRAError`."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except SSMLoRAError as raised:
                error = raised
        result, error = self.share((result, error))
        if error is not None:
            raise error
        return result

    def on_each_node(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on the first rank of every node while the others wait, however long it takes.

        Every rank gets the result of its node; an `SSMLoRAError` of any node is raised on all ranks.
        """
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        result, error = None, None
        if self.local_rank == 0:
            try:
                result = action()
            except SSMLoRAError as raised:
                error = raised
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, (self.local_rank, result, error), group=patient)
        dist.destroy_process_group(patient)
        for _, _, error in found:
            if error is not None:
                raise error
        # The ranks of a node follow each other.
        firsts = [rank for rank, (local_rank, _, _) in enumerate(found) if local_rank == 0]
        return found[max(rank for rank in firsts if rank <= self.rank)][1]

    def gather(self, value: Any) -> list[Any]:
        """What `value` is on every rank, by rank, on all of them."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=_host)
        return values

    def collect(self, make: Callable[[], Any], ranks: Sequence[int]) -> list[Any]:
        """On rank 0 what `make` gives on each of `ranks`, one after the other; elsewhere nothing.

        Unlike with `gather`, nobody makes, holds or sends more than that.
        """
        if not self.is_main:
            if self.rank in ranks:
                dist.send_object_list([make()], dst=0, group=_host)
            return []
        values = []
        for rank in ranks:
            received = [None]
            if rank == 0:
                received = [make()]
            else:
                dist.recv_object_list(received, src=rank, group=_host)
            values += received
        return values

    def share(self, value: Any) -> Any:
        """What `value` is on rank 0."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=_host)
        return values[0]

    def when_a_rank_is_lost(self, action: Callable[[], object]) -> None:
        """Has `action` called, on a thread and for a short time, before a lost rank ends this process."""
        if self.watch is not None:
            self.watch.before_exit = action

    def about_to_stop(self) -> None:
        """Says, in a `finally`, that this rank ends by itself, however long after the others."""
        if self.watch is not None:
            self.watch.about_to_leave(sys.exception())

    def note_checkpoint(self, path: str) -> None:
        """The checkpoint that is named when a rank is lost; rank 0 notes it for all."""
        if self.watch is not None:
            self.watch.note_checkpoint(path)

    @property
    def noted_checkpoint(self) -> str | None:
        """The checkpoint that rank 0 has noted last, as far as this rank has heard of it."""
        return None if self.watch is None else self.watch.last_checkpoint


def start_process_group(timeout_seconds: int, verbose: bool = False) -> DistributedContext:
    """Joins the processes started by the DeepSpeed launcher, torchrun or srun, or a plain python command.

    From here to `stop_process_group` the ranks watch each other (`liveness.PeerWatch`).

    Args:
        timeout_seconds: after which a collective that a rank never joins is an error; a rank that gives no
            sign is missed after half of it, or `LONGEST_SILENCE_SECONDS`.
        verbose: shows what DeepSpeed says while it starts.

    Raises:
        ConfigError: the environment does not say who this process is, or not what it alone computes on.
        TrainingError: when the processes, or their GPUs, cannot find each other.
    """
    with progress("loading DeepSpeed"):
        deepspeed = _deepspeed(verbose)

    global _host
    environment = read_launch_environment()
    values = (environment.rank, environment.world_size, environment.local_rank)
    meeting = (environment.address, environment.port) if environment.address else ("127.0.0.1", _free_port())
    # Where torch and DeepSpeed look.
    os.environ.update(zip(VARIABLES, map(str, (*values, *meeting)), strict=True))
    os.environ["LOCAL_WORLD_SIZE"] = str(environment.local_world_size)
    cuda = device_type() == "cuda"
    device = (
        torch.device("cuda", _device_index(environment, torch.cuda.device_count()))
        if cuda
        else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    # DeepSpeed would compile shared-memory collectives for CPUs at the first run: a minute, and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = timedelta(seconds=timeout_seconds)
    try:
        with progress("waiting for all ranks"):
            deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout, verbose=verbose)
            _host = dist.new_group(backend="gloo", timeout=timeout) if cuda else None
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the processes of this run could not connect ({error}); check that MASTER_ADDR and MASTER_PORT "
            "are reachable and that no other run uses the port (deepspeed --master_port N)"
        ) from error
    context = DistributedContext(dist.get_rank(), dist.get_world_size(), environment.local_rank, device)
    watch = _start_watch(context, min(LONGEST_SILENCE_SECONDS, timeout_seconds / 2))
    try:
        if cuda and context.world_size > 1:
            _check_gpus(context)
    except SSMLoRAError:
        stop_process_group()
        raise
    return replace(context, watch=watch)


def stop_process_group() -> None:
    """Ends the process group; without it a gloo process aborts at exit.

    To be called in a `finally`: an exception that is on its way out is told to the other ranks. On NCCL it is
    shown here, for whoever ends a communicator that other ranks still work with may wait for ever; it is
    aborted for the same reason.
    """
    global _watch, _host
    error = sys.exception()
    if _watch is not None:
        _watch.leave(error)
        _watch = None
    _host = None
    if dist.is_initialized():
        from deepspeed.utils import groups

        if error is not None and dist.get_backend() == "nccl":
            if isinstance(error, Exception):
                show_error(error)
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        # DeepSpeed's engines leave a group of all ranks there; held, its threads would run on.
        groups._WORLD_GROUP = None


def _deepspeed(verbose: bool) -> Any:
    """DeepSpeed, which tries as it is imported what it could compile, and prints what it finds.

    The standard output is for results: what it logs goes to the standard error stream.
    """
    printed = sys.stderr if verbose else io.StringIO()
    with contextlib.redirect_stdout(printed):
        import deepspeed
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in (printed, sys.stdout):
            handler.setStream(sys.stderr)
    return deepspeed


def _check_gpus(context: DistributedContext) -> None:
    """Has the GPUs of all ranks talk to each other, once; all ranks call it.

    Raises:
        ConfigError: two ranks compute on one.
        TrainingError: NCCL cannot connect them.
    """
    mine = (str(torch.cuda.get_device_properties(context.device).uuid), socket.gethostname())
    rank_of: dict[str, int] = {}
    for rank, (gpu, host) in enumerate(context.gather(mine)):
        other = rank_of.setdefault(gpu, rank)
        if other != rank:
            problem = (
                f"ranks {other} and {rank} compute on the same GPU (host {host}, {gpu}); allowed: one rank "
                "on each; start as many processes on a node as it has GPUs, and show every process either "
                "all of them or one of its own (CUDA_VISIBLE_DEVICES)"
            )
            raise ConfigError([problem], source="environment")
    total = torch.ones(1, device=context.device)
    try:
        with progress("connecting the GPUs"):
            dist.all_reduce(total)
            total.item()
    except RuntimeError as error:
        raise TrainingError(
            f"the GPUs of this run cannot talk to each other: {_nccl_reason(str(error))}. NCCL_DEBUG=INFO "
            "shows what NCCL tries; NCCL_SOCKET_IFNAME names the network interface, where there are several"
        ) from error


def _nccl_reason(text: str) -> str:
    """What NCCL itself gives as the last error, behind torch's account of where it met one."""
    _, marker, reason = text.partition("Last error:")
    return " ".join((reason if marker else text).split()).rstrip(".")


def _start_watch(context: DistributedContext, silence_seconds: float) -> PeerWatch | None:
    global _watch
    if context.world_size == 1:
        return None
    peers: list[Peer] = []
    try:
        peers = meet(context.rank, context.world_size, os.environ["MASTER_ADDR"], context.share)
    except OSError as error:
        print(f"warning: rank {context.rank} cannot watch the others: {error}", file=sys.stderr)
    if context.max([float(not peers)])[0]:
        return None
    # Without rank 0 the others cannot agree on who speaks: the next rank does, and one on every machine.
    speaks = context.rank <= 1 or context.local_rank == 0
    _watch = PeerWatch(context.rank, peers, silence_seconds, speaks)
    return _watch


def _device_index(environment: LaunchEnvironment, num_devices: int) -> int:
    """The GPU of a process: by its number on the node, or the one that a scheduler has left it.

    Raises:
        ConfigError: the node has fewer GPUs than processes.
    """
    if num_devices == 1:
        return 0
    if environment.local_rank >= num_devices:
        problem = (
            f"LOCAL_RANK: {environment.local_rank} given; allowed: below {num_devices}, the number of GPUs "
            "that this process sees; start as many processes on a node as it has GPUs"
        )
        raise ConfigError([problem], source="environment")
    return environment.local_rank


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
