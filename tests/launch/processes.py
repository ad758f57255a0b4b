"""Real processes for tests: on the CPU, off the network, with a time limit, and none of them outlives it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ssmlora_dist.ranks import OF_A_RANK

from .preloaded import Forked

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT = ROOT / "launch" / "train.py"
GENERATE_SCRIPT = ROOT / "launch" / "generate.py"
DEBUG_TINY = ROOT / "configs" / "debug_tiny.json"

# Many times what the slowest takes on two busy cores: only a process that hangs reaches it.
TIMEOUT_SECONDS = 400.0

ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}

_SETTINGS_OF_THE_USER = ("HF_", "TRANSFORMERS_", "DATASETS_", "MLFLOW_", "DS_ACCELERATOR", "DEEPSPEED_")


# What of it a busy machine makes long enough to be shown is chance; training always is.
_PROGRESS_LINE = re.compile(r"^(?!training ).*, ([\d:]+( left)?|\? left)\n", re.MULTILINE)


@dataclass(frozen=True)
class Finished:
    """What a process left: its exit code and what it wrote, progress aside (see `without_progress`)."""

    exit_code: int
    stdout: str
    stderr: str


def environment(directory: Path, **variables: str) -> dict[str, str]:
    """The environment of a test's process: this one's, without what would change what it does."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in OF_A_RANK and not name.startswith(_SETTINGS_OF_THE_USER)
    }
    return {
        **kept,
        # One thread per process: several of them share few cores.
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # Nothing listens there: a test neither depends on the network nor waits for it.
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
        "HF_HOME": str(directory / "hub"),
        **variables,
    }


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rank_variables(num_ranks: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank of one run on this machine's processor, on a port of its own."""
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**ON_CPU, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def finish(
    commands: Sequence[Sequence[str]],
    directory: Path,
    variables: Sequence[Mapping[str, str]],
    meanwhile: Callable[[list[int]], object] = lambda pids: None,
) -> list[Finished]:
    """Runs commands side by side, each with its variables, and waits for all of them.

    Args:
        commands: what to run; one that begins with `-m` is a module, which finds what it needs imported
            (see `Forked`).
        directory: where; must exist.
        variables: environment of each, beside `environment`.
        meanwhile: called once all have been started; each leads a session and process group of its own.

    Raises:
        AssertionError: they took longer than `TIMEOUT_SECONDS`; all of them are killed.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    with contextlib.ExitStack() as stack:
        # Files, not pipes: a process that is not read from must not block the others.
        streams = [
            [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(2)]
            for _ in commands
        ]
        processes = []
        for command, own, (stdout, stderr) in zip(commands, variables, streams, strict=True):
            variables_of_it = environment(directory, **own)
            process: Forked | subprocess.Popen[bytes]
            if command[0] == "-m":
                process = Forked(command[1:], directory, variables_of_it, stdout.fileno(), stderr.fileno())
            else:
                process = subprocess.Popen(
                    command,
                    cwd=directory,
                    env=variables_of_it,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
            stack.callback(_kill_session, process)
            processes.append(process)
        meanwhile([process.pid for process in processes])
        try:
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            written = "\n".join(_content(stream) for pair in streams for stream in pair)
            raise AssertionError(
                f"took longer than {TIMEOUT_SECONDS:g} seconds: {commands}\n{written}"
            ) from None
        return [
            Finished(code, _content(stdout), without_progress(_content(stderr)))
            for code, (stdout, stderr) in zip(codes, streams, strict=True)
        ]


def run(command: Sequence[str], directory: Path, **variables: str) -> Finished:
    """Runs one command in `directory` and waits for it; see `finish`."""
    return finish([command], directory, [variables])[0]


def train_command(*arguments: str) -> list[str]:
    """`python launch/train.py` with arguments."""
    return [sys.executable, str(TRAIN_SCRIPT), *arguments]


def launched(launcher: str, num_ranks: int, *arguments: str) -> list[str]:
    """`launch/train.py` under `deepspeed` or `torchrun`, on a port of its own."""
    # The launcher of this environment, whether or not it is activated.
    program = str(Path(sys.executable).with_name(launcher))
    settings = {
        "deepspeed": ["--num_accelerators", str(num_ranks), "--master_port", str(free_port())],
        "torchrun": ["--nproc_per_node", str(num_ranks), "--master_port", str(free_port())],
    }
    return [program, *settings[launcher], str(TRAIN_SCRIPT), *arguments]


def others_in_session(session: int) -> list[int]:
    """The processes that run in a session, its leader aside."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and int(entry.name) != session:
                # Behind the name, which may hold anything: state, parent, group, session.
                state, _, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(own) == session and state != "Z":
                    found.append(int(entry.name))
    return found


def without_progress(text: str) -> str:
    """What was written, but for the progress of work other than training."""
    return _PROGRESS_LINE.sub("", text)


def _content(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


def _kill_session(process: Forked | subprocess.Popen[bytes]) -> None:
    """Kills a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
