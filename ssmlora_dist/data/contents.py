"""What data are, by their contents: short texts that are other ones as soon as any of it is another."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from ssmlora_dist.data.examples import Example
from ssmlora_dist.records import Record

_AS_TEXT = (bytes, datetime.date, datetime.time, datetime.timedelta, Decimal)


def examples_digest(examples: Sequence[Example]) -> str:
    """sha256 (hexadecimal) of token ids and labels in their order: of all that can be trained."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.int64(example.num_tokens).tobytes())
        digest.update(example.input_ids.tobytes())
        digest.update(example.labels.tobytes())
    return digest.hexdigest()


class RecordsDigest:
    """Of the records that have been read so far, in their order.

    Attributes:
        num_records: how many.
        sha256: of them (hexadecimal); empty before the first.
    """

    def __init__(self) -> None:
        self.num_records, self.sha256 = 0, ""

    def follow(self, records: Iterator[Record], check: Callable[[], object]) -> Iterator[Record]:
        """The records, each once it has been noted and `check`, which may raise, has been called."""
        for record in records:
            text = json.dumps(record.values, sort_keys=True, default=_plain)
            self.sha256 = hashlib.sha256((self.sha256 + text).encode()).hexdigest()
            self.num_records += 1
            check()
            yield record


def _plain(value: Any) -> str:
    """Of what JSON does not have, but tables and data sets do; of pictures and sounds the kind alone."""
    return str(value) if isinstance(value, _AS_TEXT) else type(value).__name__
