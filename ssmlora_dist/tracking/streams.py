"""Standard streams that a command outlives: what cannot be written there is given up, and the work goes on.

A run of days is worth more than the lines it shows. Whoever reads them may go (`| head -1`, a `tee` that
Ctrl-C has ended before us), a terminal may be closed, the disk of a log file may be full.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

from ssmlora_dist.errors import SSMLoRAError

# For good; what another error keeps from being written is dropped, and the next line may succeed.
_GONE = (errno.EPIPE, errno.EIO)
_STDOUT, _STDERR = 1, 2


class UnreadError(BrokenPipeError):
    """Nobody reads the standard output of a command that does nothing else than write it."""


class UnwrittenError(SSMLoRAError):
    """Nothing can be written to the standard output of a command that does nothing else."""


class LenientFile(io.FileIO):
    """A descriptor that seems to take all that is written to it.

    Once nobody reads it any more it leads to /dev/null, for libraries and child processes too.

    Args:
        descriptor: stays open when this is closed.
        ends_unread: raise `UnreadError` when nobody reads it any more, `UnwrittenError` at any other failure.
    """

    def __init__(self, descriptor: int, *, ends_unread: bool = False) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._ends_unread = ends_unread
        self._has_failed = False

    def write(self, data: Any, /) -> int:
        """Writes all of `data`, or as much as can be; its length in bytes."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            try:
                written = super().write(rest)
            except OSError as error:
                self._fail(error)
                break
            if written is None:
                # Somebody at the other end has made it one that does not wait.
                select.select([], [self], [])
            rest = rest[written or 0 :]
        return size

    def _fail(self, error: OSError) -> None:
        if error.errno in _GONE:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._ends_unread:
                raise UnreadError(*error.args)
        elif self._ends_unread:
            # Once: what is left in buffers is written again as the process ends.
            self._ends_unread, self._has_failed = False, True
            raise UnwrittenError(
                f"the standard output cannot be written ({error.strerror}); make room there, or write "
                "elsewhere"
            )
        if not self._has_failed and self.fileno() == _STDOUT:
            # By way of no stream, whose lock may be held by a thread that wants this one's.
            with suppress(OSError):
                os.write(
                    _STDERR, f"warning: the output cannot be written: {error.strerror}; goes on\n".encode()
                )
        self._has_failed = True


def make_lenient(*, ends_unread: bool = False) -> None:
    """Has this process's standard streams take all that is written to them from now on.

    Streams that somebody has put in the place of the standard ones stay as they are.

    Args:
        ends_unread: raise `UnreadError` where nobody reads the standard output any more, and
            `UnwrittenError` where it cannot be written.
    """
    for name, descriptor in (("stdout", _STDOUT), ("stderr", _STDERR)):
        stream = getattr(sys, name)
        if stream is None:
            # Closed before this process began, and print() alone bears that.
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = LenientFile(descriptor, ends_unread=ends_unread and descriptor == _STDOUT)
            lenient = io.TextIOWrapper(
                # As a rule: `python -u` wants every word at once.
                raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
                encoding=stream.encoding,
                # A letter that a narrow encoding lacks is written as its number.
                errors="backslashreplace" if stream.errors == "strict" else stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lenient)
