"""What MLflow takes of names, values and batches, and what a person reads of its errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ssmlora_dist.tracking.protocol import Scalar
from ssmlora_dist.tracking.store import without_credentials

# MLflow refuses longer values and names and larger batches. A batch of parameters stays far below its limit
# of 100: each may have the longest value, and a request may not pass one megabyte.
MAX_PARAMETER_LENGTH = 6000
MAX_NAME_LENGTH = 250
MAX_METRICS_PER_BATCH = 1000
MAX_PARAMETERS_PER_BATCH = 20


def valid_name(name: str) -> str:
    """A name of the characters and the length that MLflow takes on every platform."""
    return re.sub(r"[^\w.\-/ ]", "_", name)[:MAX_NAME_LENGTH]


def parameter_text(value: Scalar) -> str:
    """A parameter's value, cut where MLflow would refuse it."""
    text = str(value)
    if len(text) <= MAX_PARAMETER_LENGTH:
        return text
    mark = f" ... [cut: {len(text)} characters]"
    return text[: MAX_PARAMETER_LENGTH - len(mark)] + mark


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """`items` in lists of at most `size`."""
    everything = list(items)
    for first in range(0, len(everything), size):
        yield everything[first : first + size]


def in_short(error: Exception) -> str:
    """The first line of an error, of a length that a person reads, without passwords."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    # urllib3 puts the cause, in brackets, at the end of a long account of the request.
    cause = re.search(r"\(Caused by (.*)\)$", line)
    line = without_credentials(cause.group(1) if cause else line)
    return line if len(line) <= 200 else f"{line[:197]}..."
