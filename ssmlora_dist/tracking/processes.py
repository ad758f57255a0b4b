"""The process that a tracked run belongs to, and whether it is gone: a killed one cannot say so itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

HOST_TAG = "process.host"
# Of the kernel's own, outside every container.
_FIRST_NAMESPACE = "pid:[4026531836]"


@dataclass(frozen=True)
class Process:
    """A process, told apart from all others of any time, as far as a number alone does not.

    Attributes:
        host: name of the machine; containers may have one in common.
        machine: its installation; empty where it has no name.
        boot: its start.
        namespace: in which the number counts.
        pid: the number.
        start: of the process, in the kernel's ticks since `boot`.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    pid: str
    start: str

    @classmethod
    def own(cls) -> Process | None:
        """This process; None on a system that does not tell."""
        try:
            boot = _line("/proc/sys/kernel/random/boot_id")
            namespace = os.readlink("/proc/self/ns/pid")
            start = _start(os.getpid())
        except (OSError, ValueError):
            return None
        try:
            machine = _line("/etc/machine-id")
        except OSError:
            machine = ""
        return cls(socket.gethostname(), machine, boot, namespace, str(os.getpid()), start)

    @classmethod
    def of_tags(cls, tags: Mapping[str, str]) -> Process | None:
        """The inverse of `tags`; None where one is missing."""
        try:
            return cls(**{name: tags[f"process.{name}"] for name in cls.__dataclass_fields__})
        except KeyError:
            return None

    def tags(self) -> dict[str, str]:
        """As tags of its run."""
        return {f"process.{name}": value for name, value in asdict(self).items()}

    def is_gone(self, seen_from: Process) -> bool:
        """Whether it has ended for certain; what cannot be seen from another process counts as alive."""
        here = seen_from
        if (self.host, self.machine) != (here.host, here.machine):
            return False
        if self.boot != here.boot:
            # Restarted, if it is one machine and no container of two.
            return bool(self.machine) and self.namespace == here.namespace == _FIRST_NAMESPACE
        if self.namespace != here.namespace:
            return False
        try:
            # Of another user it may be all that can be seen.
            os.kill(int(self.pid), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, OverflowError):
            pass
        try:
            return _start(int(self.pid)) != self.start
        except (OSError, ValueError):
            return False


def _line(path: str) -> str:
    return Path(path).read_text(encoding="ascii").strip()


def _start(pid: int) -> str:
    """When a process started; empty for one that has ended and waits for its parent to notice."""
    # Behind the name, which may hold anything: state, parent, and so on, the start as the 20th.
    fields = (
        Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    )
    return "" if fields[0] in "ZX" else fields[19]
