"""One point as processes of a group of their own, and what a killed sweep has left running."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ssmlora_dist.durable import explained
from ssmlora_dist.ranks import OF_A_RANK

# In the environment of everything that a sweep starts: its directory.
MARK = "SSMLORA_SWEEP"
# Over the time that a run takes to save: for launchers, libraries and trackers to end.
EXTRA_GRACE_SECONDS = 60.0
_PAUSE_SECONDS = 0.1
# What shells say of a command that cannot be run.
_NOT_STARTED = 126
_KERNEL_COUNTS = Path("/proc/vmstat")


def command(script: Path, arguments: Sequence[str], *, ranks: int, port: int, on_cuda: bool) -> list[str]:
    """`python SCRIPT`, or for more than one rank DeepSpeed's launcher with it.

    On CUDA the launcher takes the devices in CUDA_VISIBLE_DEVICES; it does so only unless told their number.
    """
    if ranks == 1:
        return [sys.executable, str(script), *arguments]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(port)]
    number = [] if on_cuda else ["--num_accelerators", str(ranks)]
    return [*launcher, *number, str(script), *arguments]


def environment(directory: Path, variables: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment, without what would make a rank of the child; None removes a variable."""
    changes = {**dict.fromkeys(OF_A_RANK), MARK: str(directory.resolve()), **variables}
    kept = {name: value for name, value in os.environ.items() if name not in changes}
    return kept | {name: value for name, value in changes.items() if value is not None}


def visible_devices(variable: str | None, num_devices: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the devices there are: numbers, or the names that it holds itself.

    Args:
        variable: its value; None: not set.
        num_devices: that CUDA has found by it; what it does not know ends the list for CUDA.
    """
    names = [name.strip() for name in (variable or "").split(",")]
    return names[:num_devices] if any(names) else [str(number) for number in range(num_devices)]


def num_kernel_kills() -> int | None:
    """Processes that the kernel has ended for want of memory, anywhere on the machine; None: not known."""
    with contextlib.suppress(OSError, ValueError):
        for line in _KERNEL_COUNTS.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return None


def free_port(taken: Collection[int]) -> int:
    """A port that nothing listens on and that is none of `taken`."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if port not in taken:
            return port


class PointProcess:
    """A command in a process group of its own, whose output is added to a log file.

    Args:
        command: what to run.
        environment: of it.
        log: file.
        grace_seconds: that it may take to end once it is told to.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, grace_seconds: float
    ) -> None:
        self._log, self._grace_seconds = log, grace_seconds
        self._told_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._kernel_kills = num_kernel_kills()
        with explained(log, "free some and start the sweep again"), log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self._offset = file.tell()
            try:
                self._process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                # For want of memory, say: as if it had begun and failed at once.
                file.write(f"error: cannot be started: {error}\n".encode())

    def poll(self) -> int | None:
        """The exit code, once it and everything of its group has ended; to be called again and again.

        A launcher that is killed, or told to stop, leaves ranks behind: they are told to stop, and may save.
        """
        if self._process is None:
            return _NOT_STARTED
        code = self._process.poll()
        if code is not None:
            if not _alive_in_group(self._process.pid):
                return code
            self.stop()
        if self._told_at is not None and time.monotonic() - self._told_at > self._grace_seconds:
            self.kill()
        return None

    def stop(self) -> None:
        """Tells the whole group to stop; once, as a second signal would end it at once."""
        if self._told_at is None:
            self._told_at = time.monotonic()
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the whole group."""
        self._signal(signal.SIGKILL)

    @property
    def kernel_killed(self) -> bool | None:
        """Whether the kernel has ended processes, any, for want of memory since it began; None: not known."""
        now = num_kernel_kills()
        return None if now is None or self._kernel_kills is None else now > self._kernel_kills

    def written(self) -> str:
        """Its output."""
        with self._log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode("utf-8", "replace")

    def _signal(self, signum: int) -> None:
        # Its number stays taken as long as any process of the group lives.
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signum)


def _alive_in_group(group: int) -> bool:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                # Behind the name, which may hold anything: state, parent, group.
                state, _, own = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(own) == group and state != "Z":
                    return True
    return False


def end_leftovers(directory: Path, grace_seconds: float) -> int:
    """Ends the processes of a sweep that was killed before them, so that they save; gives their number.

    Args:
        directory: of the sweep.
        grace_seconds: that they may take.
    """
    mark = f"{MARK}={directory.resolve()}".encode()
    found = _marked(mark)
    number = len(found)
    deadline = time.monotonic() + grace_seconds
    signum = signal.SIGTERM
    told: set[int] = set()
    while found:
        if time.monotonic() > deadline:
            signum, told = signal.SIGKILL, set()
        for pid in found:
            if pid not in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
                told.add(pid)
        time.sleep(_PAUSE_SECONDS)
        found = _marked(mark)
    return number


def _marked(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        # Of other users, or ended meanwhile.
        with contextlib.suppress(OSError):
            own = not entry.name.isdecimal() or int(entry.name) == os.getpid()
            if not own and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found
