"""Modules run in processes forked from one that has imported what they need, which takes eight seconds.

`python -m tests.launch.preloaded` is that one: a request a line on its input, an answer a line on its output.
Each process of pytest has its own, from the first use to its end.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEEDED = (
    "deepspeed.runtime.pipe.engine",
    "ssmlora_dist.config.loading",
    "ssmlora_dist.training.run",
    "transformers.models.llama.modeling_llama",
    "transformers.conversion_mapping",
    "torch._dynamo",
    "bitsandbytes",
    "datasets",
)


class Forked:
    """A module as it runs under `python -m`, leader of a session of its own."""

    def __init__(
        self, arguments: Sequence[str], directory: Path, environment: dict[str, str], stdout: int, stderr: int
    ) -> None:
        self._server = _Server.of_this_process(environment)
        streams = [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in (stdout, stderr)]
        self.pid = self._server.fork([list(arguments), str(directory), environment, streams])

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or as `subprocess` has it the negative number of the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """
        return self._server.exit_code(self.pid, timeout)


class _Server:
    _mine: _Server | None = None

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.preloaded"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
            cwd=tempfile.gettempdir(),
            bufsize=0,
            start_new_session=True,
        )
        self._codes: dict[int, int] = {}
        self._unread = b""

    @classmethod
    def of_this_process(cls, environment: dict[str, str]) -> _Server:
        if cls._mine is None:
            cls._mine = cls(environment)
            atexit.register(cls._mine._end)
        return cls._mine

    def fork(self, request: list[Any]) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        while True:
            answer = self._answer(None)
            if "forked" in answer:
                return answer["forked"]

    def exit_code(self, pid: int, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while pid not in self._codes:
            self._answer(deadline)
        return self._codes[pid]

    def _answer(self, deadline: float | None) -> dict[str, int]:
        """The next line of the server; exit codes are noted."""
        assert self._process.stdout is not None
        while b"\n" not in self._unread:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise subprocess.TimeoutExpired("a forked module", left or 0.0)
            read = os.read(self._process.stdout.fileno(), 65536)
            assert read, "the preloaded process has ended"
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, int] = json.loads(line)
        if "ended" in answer:
            self._codes[answer["ended"]] = answer["code"]
        return answer

    def _end(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def preload() -> None:
    """Imports what ranks need."""
    for module in NEEDED:
        importlib.import_module(module)


def hide_plots() -> None:
    """As if matplotlib were not installed: nobody looks at the plots, which take as long as some runs."""
    sys.modules["matplotlib"] = None  # type: ignore[assignment]


def main() -> None:
    preload()
    running: set[int] = set()
    unread = b""
    while True:
        # The requests' end is that of whoever makes them.
        if select.select([0], [], [], 0.01)[0]:
            read = os.read(0, 65536)
            if not read:
                break
            unread += read
            *requests, unread = unread.split(b"\n")
            for request in requests:
                pid = _fork(*json.loads(request))
                running.add(pid)
                _say({"forked": pid})
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            running.discard(pid)
            _say({"ended": pid, "code": os.waitstatus_to_exitcode(status)})
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _say(answer: dict[str, int]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def _fork(arguments: list[str], directory: str, environment: dict[str, str], streams: list[str]) -> int:
    opened = [
        os.open("/dev/null", os.O_RDONLY),
        *(os.open(path, os.O_WRONLY | os.O_APPEND) for path in streams),
    ]
    pid = os.fork()
    if pid:
        for descriptor in opened:
            os.close(descriptor)
        return pid
    exit_code = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(opened):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        exit_code = 0
    except SystemExit as exit_:
        exit_code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    raise AssertionError


if __name__ == "__main__":
    main()
