"""The exceptions a user sees, and the exit codes of the command line.

Every exception here carries a message that names the place and the remedy; the command line prints it
without a traceback and exits with the exception's `exit_code`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

LONGEST_LINE = 900
EXIT_DONE = 0
EXIT_UNFORESEEN = 1
EXIT_BAD_INPUT = 2
EXIT_TRAINING_FAILED = 3
# Of PyTorch on CUDA and on the CPU, of cuBLAS and NCCL, of Python and of the C library.
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|"
    r"Cannot allocate memory|^MemoryError|std::bad_alloc",
    re.MULTILINE | re.IGNORECASE,
)
"""What is said, in logs and errors, where memory has run out."""


class SSMLoRAError(Exception):
    """Base of every error that a user can cause and mend.

    Attributes:
        exit_code: of the command line.
        label: what its message begins with there.
        met_by_all: whether every rank has met it for certain, so that rank 0 speaks for all.
    """

    exit_code = EXIT_BAD_INPUT
    label = "error"
    met_by_all = False


class ConfigError(SSMLoRAError):
    """One or more problems of a run configuration, one line each.

    Args:
        problems: messages of the form `dotted.path: value given, what is allowed, how to mend it`.
        source: the file the configuration came from, for the heading.
    """

    def __init__(self, problems: Sequence[str], source: str = "configuration") -> None:
        self.problems, self.source = [_one_line(problem) for problem in problems], _one_line(source)
        count = len(self.problems)
        heading = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([heading, *(f"  {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent from rank to rank.
        return type(self), (self.problems, self.source)


def _one_line(text: str) -> str:
    """`text` as one line that can be shown, with what somebody may have put into a name or value."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    # The place stands at the beginning, the remedy at the end.
    half = LONGEST_LINE // 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} ... {text[-half:]}"


class DataError(SSMLoRAError):
    """A data file, record or data set that cannot be used; the message names file and line."""


class ModelError(SSMLoRAError):
    """A backbone that cannot be found, read or is not supported."""


class AdapterError(SSMLoRAError):
    """An adapter that does not fit the model, or an adapter directory that cannot be read."""


class CheckpointError(SSMLoRAError):
    """A run directory or checkpoint that cannot be used as asked."""


class TrainingError(SSMLoRAError):
    """Training diverged or failed after it had started."""

    exit_code = EXIT_TRAINING_FAILED
