"""Moments in the life of a rank at which something is done to it: at the n-th call of a function."""

from __future__ import annotations

import functools
import importlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# What is counted, by the function that is called there.
PLACES = {
    "part loaded": ("ssmlora_dist.models.loading", "fill"),
    "evaluation": ("ssmlora_dist.training.run", "evaluate"),
    "step": ("ssmlora_dist.training.run", "learning_rate"),
    "check": ("ssmlora_dist.training.interrupts", "Interrupts.check"),
    "group ended": ("ssmlora_dist.distributed.context", "stop_process_group"),
}
# A change of the disk below a directory of that name is counted under this and the name.
DISK = "disk/"
CHANGES = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")


def at(place: str, number: int, action: Callable[[], object]) -> None:
    """Has `action` called before the n-th call from now on, from 1, of what `PLACES` or `DISK` say."""
    count = _Count(number, action)
    if place.startswith(DISK):
        _watch_disk(place.removeprefix(DISK), count)
        return
    module_name, path = PLACES[place]
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module_name))
    setattr(owner, name, _counted(getattr(owner, name), lambda *_, **__: True, count))


def kill() -> NoReturn:
    """Ends this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("no process outlives that")


def hang() -> NoReturn:
    """Never returns, as a write to a server that is away."""
    while True:
        time.sleep(1)


class _Count:
    """Calls `action` at one of many events, which may come from several threads."""

    def __init__(self, number: int, action: Callable[[], object]) -> None:
        self._remaining, self._action = number, action
        self._lock = threading.Lock()

    def event(self) -> None:
        with self._lock:
            self._remaining -= 1
            due = self._remaining == 0
        if due:
            self._action()


def _counted(function: Callable[..., Any], counts: Callable[..., bool], count: _Count) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if counts(*arguments, **options):
            count.event()
        return function(*arguments, **options)

    return call


def _watch_disk(directory: str, count: _Count) -> None:
    def is_below(path: Any, *_: Any, **options: Any) -> bool:
        place = Path(os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else path)
        if options.get("dir_fd") is not None:
            place = Path(os.readlink(f"/proc/self/fd/{options['dir_fd']}")) / place
        return directory in place.parts

    def writes(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return bool(set(mode) & set("wax+")) and is_below(path)

    for name in CHANGES:
        setattr(os, name, _counted(getattr(os, name), is_below, count))
    # What pathlib opens files with.
    io.open = _counted(io.open, writes, count)  # type: ignore[assignment]
