"""Ranks forked from a process that has imported all they need, which costs more than what they do."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .processes import without_progress

TIMEOUT_SECONDS = 200.0

Action = Callable[[], int]


class Ranks:
    """Processes of one run, each with an action that gives its exit code, in a directory of their own.

    One that has been stopped is continued as soon as all others have ended.
    """

    def __init__(self, actions: Sequence[Action], directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._deadline = time.monotonic() + TIMEOUT_SECONDS
        self._codes: dict[int, int] = {}
        self._ended_at: dict[int, float] = {}
        self._stopped: set[int] = set()
        self._pids = [_fork(action, directory, rank) for rank, action in enumerate(actions)]

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self._pids):
            if rank in self._codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if ended and os.WIFSTOPPED(status):
                self._stopped.add(rank)
            elif ended:
                self._codes[rank] = os.waitstatus_to_exitcode(status)
                self._ended_at[rank] = time.monotonic()
        running = set(range(len(self._pids))) - set(self._codes)
        late = time.monotonic() > self._deadline
        for rank in running if late or running <= self._stopped else ():
            os.kill(self._pids[rank], signal.SIGKILL if late else signal.SIGCONT)
            self._stopped.discard(rank)
        return not running

    @property
    def first_ended_at(self) -> float | None:
        """When the first of them ended, by the system's monotonic clock."""
        return min(self._ended_at.values(), default=None)

    def kill(self, rank: int) -> None:
        """Kills one that has not been seen to end, as the kernel does when memory is short."""
        if rank not in self._codes:
            os.kill(self._pids[rank], signal.SIGKILL)

    def found(self) -> list[dict[str, Any]]:
        """Of every rank what it wrote, progress aside, its exit code and when it ended.

        The time is by the system's monotonic clock.
        """
        return [
            {
                "exit_code": self._codes[rank],
                "ended_at": self._ended_at[rank],
                "stdout": _file(self._directory, rank, "stdout").read_text(),
                "stderr": without_progress(_file(self._directory, rank, "stderr").read_text()),
            }
            for rank in range(len(self._pids))
        ]


def run_side_by_side(
    runs: Mapping[str, Sequence[Action]], directory: Path, num_at_once: int
) -> dict[str, list[dict[str, Any]]]:
    """Forks the ranks of all runs, of so many at once, and gives what `Ranks.found` says of each."""
    waiting = list(runs)
    running: dict[str, Ranks] = {}
    found = {}
    while waiting or running:
        while waiting and len(running) < num_at_once:
            name = waiting.pop(0)
            running[name] = Ranks(runs[name], directory / name.replace(" ", "_"))
        for name in [name for name, ranks in running.items() if ranks.poll()]:
            found[name] = running.pop(name).found()
        time.sleep(0.02)
    return found


def _file(directory: Path, rank: int, name: str) -> Path:
    return directory / f"{rank}.{name}"


def _fork(action: Action, directory: Path, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    exit_code = 1
    try:
        os.chdir(directory)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(_file(directory, rank, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
        exit_code = action()
    except SystemExit as exit_:
        exit_code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(exit_code)
