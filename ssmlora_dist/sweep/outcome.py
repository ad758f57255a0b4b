"""What became of a point: by the exit code of its process and by what that wrote."""

from __future__ import annotations

import re
import signal

from ssmlora_dist.errors import EXIT_DONE, EXIT_TRAINING_FAILED, OUT_OF_MEMORY
from ssmlora_dist.signals import STOPPING
from ssmlora_dist.sweep.directory import Outcome

LONGEST_REASON = 300
# DeepSpeed's launcher hands on the code of a killed rank modulo 256.
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL, 256 - signal.SIGKILL)
# Of these, 255 is also what many a program fails with.
_TOLD_TO_STOP = {code for signum in STOPPING for code in (-signum, 128 + signum, 256 - signum)} - {255}
_OWN_MESSAGE = re.compile(r"^(error(?: on rank \d+)?|stopped): (.*)$")
_EXCEPTION = re.compile(
    r"^(?:\[rank\d+\]: ?)?((?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b(?::.*)?)$"
)


def outcome_of(exit_code: int, log: str, kernel_killed: bool | None = None) -> tuple[Outcome, str | None]:
    """Outcome and reason of a process that has ended by itself.

    Args:
        exit_code: negative for a signal.
        log: all that it wrote.
        kernel_killed: whether the kernel has ended processes for want of memory meanwhile; None: not known.
    """
    if exit_code == EXIT_DONE:
        return "finished", None
    memory = OUT_OF_MEMORY.search(log)
    if memory is not None:
        return "out_of_memory", _line_around(log, memory)
    if exit_code in _KILLED:
        return _killed(exit_code, kernel_killed)
    if exit_code in _TOLD_TO_STOP:
        return "stopped", stopped_reason(log) or f"told to stop by a signal (exit code {exit_code})"
    if exit_code < 0:
        return "failed", f"ended by {_signal_name(-exit_code)}"
    said = _last_message(log) or _last_exception(log) or _last_line(log) or "it wrote nothing"
    # The words of the training loop, where loss or gradients were not finite too many times in a row.
    prefix = "diverged: " if exit_code == EXIT_TRAINING_FAILED and "not finite" in said else ""
    return "failed", _short(f"{prefix}{said} (exit code {exit_code})")


def _killed(exit_code: int, kernel_killed: bool | None) -> tuple[Outcome, str]:
    said = f"killed by SIGKILL (exit code {exit_code})"
    if kernel_killed:
        return "out_of_memory", (
            f"{said}, when the kernel ended processes because the machine or its container was out of memory"
        )
    if kernel_killed is None:
        return "failed", f"{said}, by whom is not known: the kernel too kills so, when it is out of memory"
    return "failed", f"{said}, by a person or a program: the kernel has ended nothing for want of memory"


def stopped_reason(log: str) -> str | None:
    """What a process that was told to stop says of where it stands; None where it says nothing."""
    for line in reversed(log.splitlines()):
        found = _OWN_MESSAGE.match(line)
        if found is not None and found[1] == "stopped":
            return _short(found[2])
    return None


def _last_message(log: str) -> str | None:
    """The last error of our own; with its first problem, where it is a heading with problems below."""
    lines = log.splitlines()
    for index in reversed(range(len(lines))):
        found = _OWN_MESSAGE.match(lines[index])
        if found is None:
            continue
        below = lines[index + 1].strip() if index + 1 < len(lines) and lines[index + 1][:2] == "  " else ""
        return f"{found[2]}: {below}" if below else found[2]
    return None


def _last_exception(log: str) -> str | None:
    found = (_EXCEPTION.match(line) for line in reversed(log.splitlines()))
    return next((match[1] for match in found if match is not None), None)


def _last_line(log: str) -> str | None:
    return next((line.strip() for line in reversed(log.splitlines()) if line.strip()), None)


def _line_around(log: str, found: re.Match[str]) -> str:
    start = log.rfind("\n", 0, found.start()) + 1
    end = log.find("\n", found.start())
    return _short(log[start : end if end >= 0 else len(log)].strip())


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 3]}..."
