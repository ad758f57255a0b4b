"""Paths as users write them, in configurations and on command lines."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ssmlora_dist.config.shown import shown


def expanded(text: str) -> str:
    """`text` with the home directory that a leading `~` stands for; idempotent.

    Raises:
        ValueError: no path can be so, or there is no such user.
    """
    if "\0" in text:
        raise ValueError(f"{shown(text)} given; allowed: a path, which has no null character; remove it")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(
            f"{shown(text)} given; {shown(user)} is nobody's home here; write the path out (with ./ before a "
            "name that begins so)"
        )
    return path


def refusal(path: str | Path) -> str | None:
    """That the operating system does not even look at a path, and why; None where it would."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"the system refuses it ({error.strerror})"
    return None


def directory_refusal(path: Path) -> str | None:
    """That no directory can be made at a path, and why; None where it can, or is there."""
    reason = refusal(path)
    if reason is None:
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        reason = None if there.is_dir() else f"{shown(str(there))} is a file"
    return reason


def path_argument(text: str) -> Path:
    """The type of every path on a command line: expanded, and one that the operating system takes."""
    return Path(name_argument(text))


def name_argument(text: str) -> str:
    """As `path_argument`, of what may be a hub's name or a word too; the rest of it stays as it is."""
    try:
        path = expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if (reason := refusal(path)) is not None:
        raise argparse.ArgumentTypeError(f"{shown(text)} given; {reason}; name another path")
    return path
