"""Commands whose output cannot be written, each in a process of its own, forked for speed.

Prints the exit code of each, and what arrived where it could be written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import NoReturn

from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.errors import TrainingError
from ssmlora_dist.tracking import Console


def speak() -> None:
    """In every way there is, more than any buffer holds."""
    console = Console()
    for _ in range(200):
        console.message("a message" * 100)
        console.warn("a warning")
        print("printed")
        print("printed", file=sys.stderr)
        warnings.warn("a warning", stacklevel=1)
        logging.getLogger("library").error("a record")
    # As a library in C does it.
    with contextlib.suppress(OSError):
        os.write(1, b"written")
    # Not flushed: the interpreter does that as it ends.
    print("the last line", end="")


def fail() -> NoReturn:
    speak()
    raise TrainingError("diverged")


def interrupt() -> NoReturn:
    speak()
    raise KeyboardInterrupt


def crash() -> NoReturn:
    speak()
    raise ZeroDivisionError


def without_readers(*descriptors: int) -> None:
    """As `| head -1` leaves them."""
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in descriptors:
        os.dup2(writing, descriptor)


def on_a_full_disk() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def on_a_closed_terminal() -> None:
    """Whoever writes to it gets EIO."""
    controlling, terminal = os.openpty()
    os.close(controlling)
    for descriptor in (1, 2):
        os.dup2(terminal, descriptor)


def unhurried() -> None:
    """A pipe that its reader has made one that never waits, and that it empties slowly."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    pid = os.fork()
    if not pid:
        os.dup2(writing, 1)
        os.close(writing)
        return
    os.close(writing)
    parts = []
    while part := os.read(reading, 1000):
        parts.append(part)
    os.write(1, b"".join(parts))
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def closed_from_the_start() -> None:
    """As `>&-` leaves them."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, None)
        setattr(sys, f"__{name}__", None)


def in_latin_1() -> None:
    sys.stdout.reconfigure(encoding="latin-1", errors="strict")
    run_name.append("→")


run_name = ["run"]
CASES: dict[str, tuple[Callable[[], object], Callable[[], object], bool]] = {
    "nobody reads": (lambda: without_readers(1, 2), speak, False),
    "nobody reads the output": (lambda: without_readers(1), speak, False),
    "nobody reads a failure": (lambda: without_readers(1, 2), fail, False),
    "nobody reads an interruption": (lambda: without_readers(1, 2), interrupt, False),
    "nobody reads a traceback": (lambda: without_readers(1, 2), crash, False),
    "nobody reads an answer": (lambda: without_readers(1, 2), speak, True),
    "full disk for an answer": (on_a_full_disk, speak, True),
    "full disk": (on_a_full_disk, speak, False),
    "closed terminal": (on_a_closed_terminal, speak, False),
    "pipe that does not wait": (unhurried, speak, False),
    "closed from the start": (closed_from_the_start, speak, False),
    "narrow encoding": (in_latin_1, lambda: print(*run_name), False),
}


def main() -> None:
    found = {}
    for name, (prepare, command, ends) in CASES.items():
        with tempfile.TemporaryFile("w+") as written:
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                os.dup2(written.fileno(), 1)
                os.dup2(written.fileno(), 2)
                prepare()
                sys.exit(run_command(command, ends_unread=ends))
            _, status = os.waitpid(pid, 0)
            written.seek(0)
            found[name] = (os.waitstatus_to_exitcode(status), written.read())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
