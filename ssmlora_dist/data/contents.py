"""What data are, by their contents: short texts that are other ones as soon as any of it is another."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.records import Record

_AS_TEXT = (bytes, datetime.date, datetime.time, datetime.timedelta, Decimal)


def source_digest(files: Sequence[Path] = (), texts: Iterable[str] = ()) -> str:
    """sha256 (hexadecimal) of all that is in files, and of texts.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise unreadable(file, error) from None
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def unreadable(file: Path, error: OSError) -> DataError:
    """What is said of a file that the system does not give."""
    return DataError(
        f"{file}: cannot be read ({error.strerror or error}); mend its access rights or name another"
    )


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
