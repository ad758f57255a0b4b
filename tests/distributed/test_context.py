"""Collectives of the run's own, and a port that another run holds."""

from __future__ import annotations

import io
import logging
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssmlora_dist.distributed.context import (
    DistributedContext,
    _check_gpus,
    _deepspeed,
    _device_index,
    stop_process_group,
)
from ssmlora_dist.errors import ConfigError, TrainingError
from ssmlora_dist.ranks import LaunchEnvironment

from ..launch.processes import finish, free_port, run
from .conftest import WORLD_SIZES, Results


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_sums_and_maxima_are_the_same_on_every_rank(results: Results, num_ranks: int) -> None:
    for found in results.found(num_ranks, "collectives"):
        assert found["sum"] == [num_ranks, sum(0.25 * rank for rank in range(num_ranks))]
        assert found["max"] == [1.0, 0.25 * (num_ranks - 1)]


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_rank_0_collects_and_the_others_hold_nothing(results: Results, num_ranks: int) -> None:
    first, *others = results.found(num_ranks, "collectives")
    assert first["collected"] == [10 * rank for rank in range(num_ranks)]
    assert first["collected of last"] == [10 * (num_ranks - 1)]
    assert all(found["collected"] == found["collected of last"] == [] for found in others)


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_rank_0_acts_and_every_rank_meets_its_error(results: Results, num_ranks: int) -> None:
    by_rank = results.found(num_ranks, "collectives")
    assert [found["ran"] for found in by_rank] == [[0], *[[]] * (num_ranks - 1)]
    assert {found["refused"] for found in by_rank} == {"refused on rank 0"}


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_the_first_rank_of_a_node_acts_for_it_and_all_meet_the_error_of_one(
    results: Results, num_ranks: int
) -> None:
    by_rank = results.found(num_ranks, "collectives")
    assert [found["of node"] for found in by_rank] == [0] * num_ranks
    assert [found["of own node"] for found in by_rank] == list(range(num_ranks))
    assert {found["refused by last"] for found in by_rank} == {f"refused on rank {num_ranks - 1}"}


@pytest.mark.parametrize("num_ranks", WORLD_SIZES)
def test_every_rank_refuses_a_run_directory_that_is_taken(results: Results, num_ranks: int) -> None:
    for message in results.found(num_ranks, "trained twice"):
        assert "holds a run already" in message


def test_numbers_are_agreed_on_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank must not wait for its GPU between micro-batches to hear that nobody was told to stop."""
    found: list[torch.device] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values, **_: found.append(values.device))
    context = DistributedContext(0, 2, 0, torch.device("cuda", 0))
    assert context.sum([1, 2]) == [1.0, 2.0]
    assert context.max([3.0]) == [3.0]
    assert found == [torch.device("cpu")] * 2


def test_srun_s_tasks_find_each_other(tmp_path: Path) -> None:
    script = (
        "from ssmlora_dist.distributed.context import start_process_group, stop_process_group\n"
        "context = start_process_group(60)\n"
        "print(context.gather((context.rank, context.local_rank, context.is_main)))\n"
        "stop_process_group()\n"
    )
    # The port follows from the job's number.
    job = str(free_port())
    step = {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost", "CUDA_VISIBLE_DEVICES": ""}
    tasks = [{**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in ("0", "1")]
    both = finish([[sys.executable, "-c", script]] * 2, tmp_path, tasks)
    for finished in both:
        assert finished.exit_code == 0, finished.stderr
        assert finished.stdout.splitlines()[-1] == "[(0, 0, True), (1, 1, False)]"


def test_which_gpu_a_process_takes() -> None:
    node_of_four = [_device_index(LaunchEnvironment(rank, 8, rank % 4, "host", 1), 4) for rank in range(8)]
    assert node_of_four == [0, 1, 2, 3] * 2
    # A scheduler may show every task one GPU alone.
    assert _device_index(LaunchEnvironment(3, 8, 3, "host", 1), 1) == 0
    with pytest.raises(ConfigError, match="LOCAL_RANK: 4 given; allowed: below 4"):
        _device_index(LaunchEnvironment(4, 8, 4, "host", 1), 4)


class Gpus(DistributedContext):
    """Rank 0 of as many as there are GPUs, by their ids."""

    ids: tuple[str, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        assert value == (self.ids[0], socket.gethostname())
        return [(gpu, f"node{rank // 2}") for rank, gpu in enumerate(self.ids)]


def gpus(monkeypatch: pytest.MonkeyPatch, *ids: str) -> Gpus:
    context = Gpus(0, len(ids), 0, torch.device("cpu"))
    object.__setattr__(context, "ids", ids)
    properties = SimpleNamespace(uuid=ids[0])
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    return context


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values: None)
    _check_gpus(gpus(monkeypatch, "GPU-a", "GPU-b", "GPU-c"))
    with pytest.raises(ConfigError, match=r"ranks 1 and 2 compute on the same GPU \(host node1, GPU-b\)"):
        _check_gpus(gpus(monkeypatch, "GPU-a", "GPU-b", "GPU-b"))


NCCL_ERROR = """NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled system error (run with NCCL_DEBUG=INFO)
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
socketStartConnect: Connect to 10.0.0.7<41911> failed : Software caused connection abort
"""


def test_nccl_s_own_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(values: torch.Tensor) -> None:
        raise RuntimeError(NCCL_ERROR)

    monkeypatch.setattr("torch.distributed.all_reduce", fail)
    with pytest.raises(TrainingError, match=r"other: socketStartConnect: Connect to 10.0.0.7<41911> failed"):
        _check_gpus(gpus(monkeypatch, "GPU-a", "GPU-b"))


def test_what_deepspeed_tries_at_its_import_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a GPU without a CUDA toolkit it prints what it could not compile."""
    (tmp_path / "deepspeed.py").write_text(
        "import logging, sys\n"
        "logging.getLogger('DeepSpeed').addHandler(logging.StreamHandler(sys.stdout))\n"
        "print('[WARNING] async_io requires the dev libaio .so object')\n"
    )
    logger = logging.getLogger("DeepSpeed")
    others = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logger, "handlers", [others])
    monkeypatch.syspath_prepend(tmp_path)
    # So that it is taken away again.
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    _deepspeed(verbose=False)
    logger.error("something that matters")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "something that matters\n")
    assert others.stream.getvalue() == shown.err
    monkeypatch.delitem(sys.modules, "deepspeed")
    _deepspeed(verbose=True)
    shown = capsys.readouterr()
    assert (shown.out, "async_io" in shown.err) == ("", True)


def test_a_port_in_use_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    script = (
        "from ssmlora_dist.distributed.context import start_process_group\n"
        "from ssmlora_dist.config.arguments import run_command\n"
        "import sys\n"
        "sys.exit(run_command(lambda: start_process_group(30)))\n"
    )
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        finished = run(
            [sys.executable, "-c", script],
            tmp_path,
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(other.getsockname()[1]),
            CUDA_VISIBLE_DEVICES="",
        )
    assert finished.exit_code == 3, finished.stderr
    assert "--master_port" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("backend", "error", "acts"),
    [
        ("nccl", TrainingError("out of memory"), ["abort"]),
        ("nccl", ValueError("odd"), ["abort"]),
        ("nccl", None, ["destroy"]),
        ("gloo", ValueError("odd"), ["destroy"]),
    ],
)
def test_a_rank_that_fails_on_nccl_speaks_first_and_waits_for_nobody(
    backend: str,
    error: Exception | None,
    acts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Destroyed, a communicator waits for ranks that are in a collective this one never joins."""
    done: list[str] = []
    shown: list[str] = []

    def act(name: str) -> None:
        done.append(name)
        shown.append(capsys.readouterr().err)

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: backend)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: act("destroy"))
    monkeypatch.setattr("torch.distributed.distributed_c10d._abort_process_group", lambda: act("abort"))
    try:
        if error is not None:
            raise error
    except Exception:
        stop_process_group()
    else:
        stop_process_group()
    assert done == acts
    expected = str(error) if acts == ["abort"] else ""
    assert expected in shown[0]
    assert bool(expected) == bool(shown[0])


def test_nothing_keeps_the_group_s_threads_when_it_is_ended(tmp_path: Path) -> None:
    """Threads of gloo or of the store that run on at the process' end can abort it."""
    script = (
        "from pathlib import Path\n"
        "from ssmlora_dist.distributed.context import start_process_group, stop_process_group\n"
        "def threads():\n"
        "    return sorted(file.read_text().strip() for file in Path('/proc/self/task').glob('*/comm'))\n"
        "context = start_process_group(30)\n"
        # As whatever imports it in the course of a run.
        "import torch.distributed.nn.functional\n"
        # As an engine of DeepSpeed.
        "import deepspeed.utils.groups\n"
        "deepspeed.utils.groups._clone_world_group()\n"
        "context.gather(1)\n"
        "print(*threads())\n"
        "stop_process_group()\n"
        "print(*threads())\n"
    )
    finished = run([sys.executable, "-c", script], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert finished.exit_code == 0, finished.stderr
    before, after = finished.stdout.splitlines()[-2:]
    assert "gloo" in before
    assert "store" in before
    assert "gloo" not in after
    assert "store" not in after
