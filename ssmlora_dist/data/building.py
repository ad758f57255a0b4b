"""Settings of one source in, its examples out, one record after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.examples import Example
from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.data.rows import Row, RowEncoder
from ssmlora_dist.data.sources import read_records
from ssmlora_dist.errors import DataError
from ssmlora_dist.records import Paths, Record
from ssmlora_dist.tokenization import TextEncoder

Partition = Literal["train", "validation", "test"]


class ExampleReader:
    """The examples of one source of records, from any record on.

    Args:
        format: a format of `formats.FORMATS`.
        tokenizer: a transformers tokenizer.
        max_length: the most tokens of an example.
        partition: what the data are for; the hub's split by that name is read unless `split` says otherwise.
        too_long: what happens to longer rows (see `RowEncoder`).
        path: files or globs.
        hub: the name of a hub data set, instead of `path`.
        subset: its configuration.
        split: its split.
        revision: its branch, tag or commit.
        streaming: read a hub data set while it is downloaded, and no more of it than is asked for.
        fields: the format's names to paths in the records.
        prompt: template of the prompt.
        answer: template of the answer.
        choices: templates of the choices.
        labels: what labels mean, as positions of the choices.
        limit: the most records to read.

    Attributes:
        closings: what ends the turns of the conversations read so far.

    Raises:
        DataError: neither files nor a hub name or both, or settings that do not fit the format.
    """

    def __init__(
        self,
        *,
        format: str,
        tokenizer: Any,
        max_length: int,
        partition: Partition,
        too_long: Literal["drop", "truncate", "refuse"] = "drop",
        path: str | Sequence[str] | None = None,
        hub: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        streaming: bool = False,
        fields: Mapping[str, Paths] | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        choices: Sequence[str] | None = None,
        labels: Mapping[str, int] | None = None,
        limit: int | None = None,
    ) -> None:
        if (path is None) == (hub is None):
            raise DataError(
                f"{partition} data: the format {format!r} needs either `path` (files) or `hub` (a name)"
            )
        self.name: str = hub or (path if isinstance(path, str) else ", ".join(path or ()))
        self._render = make_renderer(format, tokenizer, fields, prompt, answer, choices, labels)
        self._encoder = TextEncoder(tokenizer)
        self.closings: set[str] = set()
        self._max_length, self._too_long = max_length, too_long
        self._source: dict[str, Any] = {
            "path": path,
            "hub": hub,
            "subset": subset,
            "split": split or partition,
            "revision": revision,
            "limit": limit,
            "streaming": streaming,
        }

    def read(
        self, skip: int = 0, follow: Callable[[Iterator[Record]], Iterator[Record]] = iter
    ) -> Iterator[tuple[list[Example], DatasetReport]]:
        """For each record in order its examples, and what became of its rows.

        Args:
            skip: how many records to leave out at the beginning.
            follow: gives all records back, those left out too; sees what is read.

        Raises:
            DataError: a record cannot be read or does not fit, with its place.
        """
        encoder = RowEncoder(self._encoder, self._max_length, self._too_long)
        for record in itertools.islice(follow(read_records(**self._source)), skip, None):
            rows = self._render(record)
            self.closings |= {closing for row in rows for closing in row.closings}
            examples = [example for row in rows for example in encoder.encode(row)]
            yield examples, encoder.take_report(1, len(examples)) + _unused(record)

    def nothing_left(self, report: DatasetReport) -> DataError:
        """Why there are no examples, and what to do."""
        return _nothing_left(self.name, report, self._max_length)


class RowReader:
    """The examples of rows that are made, of no records.

    Args:
        name: of what makes them, for messages.
        rows: makes them, one after another.
        tokenizer: a transformers tokenizer.
        max_length: the most tokens of an example.
        too_long: what happens to longer rows (see `RowEncoder`).

    Attributes:
        closings: nothing, as of an `ExampleReader` without conversations.
    """

    def __init__(
        self,
        name: str,
        rows: Callable[[], Iterator[Row]],
        *,
        tokenizer: Any,
        max_length: int,
        too_long: Literal["drop", "truncate", "refuse"],
    ) -> None:
        self.name, self.closings = name, frozenset[str]()
        self._rows, self._tokenizer = rows, tokenizer
        self._max_length, self._too_long = max_length, too_long

    def read(self) -> Iterator[tuple[list[Example], DatasetReport]]:
        """For each row in order its examples, and what became of it."""
        encoder = RowEncoder(TextEncoder(self._tokenizer), self._max_length, self._too_long)
        for row in self._rows():
            examples = encoder.encode(row)
            yield examples, encoder.take_report(1, len(examples))

    def nothing_left(self, report: DatasetReport) -> DataError:
        """Why there are no examples, and what to do."""
        return _nothing_left(self.name, report, self._max_length)


def _nothing_left(name: str, report: DatasetReport, max_length: int) -> DataError:
    return DataError(
        f"{name}: nothing is left of {report.num_rows} rows at max_length {max_length}: {report.why()}"
    )


def _unused(record: Record) -> DatasetReport:
    return DatasetReport(unused_fields=dict.fromkeys(record.unused(), 1))
