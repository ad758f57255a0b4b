"""Data that are read as training goes on: shuffled block by block, continued at the exact example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ssmlora_dist.batches import Batch
from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.building import ExampleReader
from ssmlora_dist.data.contents import RecordsDigest
from ssmlora_dist.data.examples import Dataset, Example
from ssmlora_dist.data.loader import BatchShape, permutation, shuffled
from ssmlora_dist.data.packing import pack
from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import progress


@dataclass(frozen=True)
class Position:
    """Where in a stream training stands, in JSON types.

    Attributes:
        epoch: passes over the source that are complete.
        num_records: records of this pass that come before the block.
        offset: rows of the block that are used.
        report: what became of the rows of all blocks before this one, as `DatasetReport`.
        num_read: records of this pass that were read to come here, those of the block included once any
            example of it is used.
        sha256: of these records, in hexadecimal.
        sha256_of_pass: of all records of the source, once a pass is complete.
    """

    epoch: int = 0
    num_records: int = 0
    offset: int = 0
    report: Mapping[str, Any] = field(default_factory=dict)
    num_read: int = 0
    sha256: str = ""
    sha256_of_pass: str = ""


@dataclass(frozen=True)
class Block:
    """Examples that are shuffled among each other: those of consecutive records.

    Attributes:
        begin: position of its first example.
        rows: in the order of training.
        report: what became of the rows of this block and all before it.
        num_read: records of this pass to the end of the block.
        sha256: of these records.
    """

    begin: Position
    rows: list[list[Example]]
    report: DatasetReport
    num_read: int
    sha256: str

    def position(self, offset: int) -> Position:
        """Where training stands once so many of the rows are used."""
        if not offset:
            return self.begin
        return replace(self.begin, offset=offset, num_read=self.num_read, sha256=self.sha256)


class ExampleStream:
    """The examples of a source as an endless row of blocks, pass after pass.

    A block takes whole records until it has `block_size` examples; its order is a function of the seed, the
    pass and the number of its first record. So the row is the same wherever it is begun.

    Args:
        reader: of the source.
        block_size: how many examples are shuffled among each other; 1: none.
        seed: of the order.
        row_tokens: examples of a block share rows, of at most so many tokens; None: each has its own.
    """

    def __init__(
        self, reader: ExampleReader, block_size: int, seed: int, row_tokens: int | None = None
    ) -> None:
        self._reader, self._block_size, self._seed = reader, block_size, seed
        self._row_tokens = row_tokens
        self._closed = False

    def sample(self) -> Dataset:
        """The first block with examples, and what became of the rows that it took.

        Raises:
            DataError: as of `blocks`.
        """
        with progress(f"reading the first records of {self._reader.name}"):
            first = next(block for block in self.blocks(Position()) if block.rows)
        examples = [example for row in first.rows for example in row]
        return Dataset(examples, first.report, frozenset(self._reader.closings))

    def first(self, number: int) -> list[list[Example]]:
        """The first rows that training takes.

        Raises:
            DataError: as of `blocks`.
        """
        with progress(f"reading the first records of {self._reader.name}"):
            blocks = (block.rows for block in self.blocks(Position()))
            return list(itertools.islice(itertools.chain.from_iterable(blocks), number))

    def check(self, position: Mapping[str, Any]) -> None:
        """Reads to where training stood.

        Args:
            position: as `StreamedBatches.position` gave it.

        Raises:
            DataError: as of `blocks`.
        """
        with progress(f"reading {self._reader.name} to where the run goes on"):
            next(self.blocks(Position(**position)))

    def blocks(self, start: Position) -> Iterator[Block]:
        """The blocks from the one of `start` on.

        Raises:
            DataError: a record cannot be read or does not fit, a whole pass gave no example, or the records
                are not those that were read before.
        """
        report = DatasetReport(**start.report)
        while not self._closed:
            before, seen = report, RecordsDigest()
            for block in self._blocks_of_pass(start, seen):
                report = block.report
                yield block
            if not start.num_records and report.num_examples == before.num_examples:
                raise self._reader.nothing_left(report)
            start = Position(start.epoch + 1, report=asdict(report), sha256_of_pass=seen.sha256)

    def close(self) -> None:
        """Ends the blocks at the next record."""
        self._closed = True

    def _other_data(self, start: Position, seen: RecordsDigest) -> DataError:
        """That what was read to come to `start`, or in the pass before it, is not what is read now."""
        if seen.num_records < start.num_read:
            found = f"it was trained on {start.num_read} records, and there are {seen.num_records}"
        else:
            found = f"other records among the first {seen.num_records} than when it was trained on them"
        return DataError(
            f"{self._reader.name}: {found}: the data are not those of the checkpoint; restore them, wherever "
            "they lie, or begin anew under another run.name"
        )

    def _blocks_of_pass(self, start: Position, seen: RecordsDigest) -> Iterator[Block]:
        def check() -> None:
            if seen.num_records == start.num_read and seen.sha256 != start.sha256:
                raise self._other_data(start, seen)

        begin, report = replace(start, offset=0), DatasetReport(**start.report)
        examples: list[Example] = []
        for of_record, its_report in self._reader.read(
            start.num_records, lambda records: seen.follow(records, check)
        ):
            if self._closed:
                return
            examples += of_record
            report += its_report
            if len(examples) >= self._block_size:
                yield self._block(begin, examples, report, seen)
                begin, examples = self._after(begin, report, seen), []
        if seen.num_records < start.num_read or start.sha256_of_pass not in ("", seen.sha256):
            raise self._other_data(start, seen)
        if seen.num_records > begin.num_records:
            yield self._block(begin, examples, report, seen)

    def _after(self, begin: Position, report: DatasetReport, seen: RecordsDigest) -> Position:
        """The beginning of the block after that of `begin`, which ends with the records that were seen."""
        number = seen.num_records
        return replace(begin, num_records=number, report=asdict(report), num_read=number, sha256=seen.sha256)

    def _block(
        self, begin: Position, examples: list[Example], report: DatasetReport, seen: RecordsDigest
    ) -> Block:
        seeds = (self._seed, begin.epoch, begin.num_records)
        order = permutation(len(examples), *seeds).tolist()
        rows = [[index] for index in order]
        if self._row_tokens is not None:
            lengths = [example.num_tokens for example in examples]
            rows = shuffled(pack(lengths, order, self._row_tokens), *seeds)
        of_rows = [[examples[index] for index in row] for row in rows]
        return Block(begin, of_rows, report, seen.num_records, seen.sha256)


class StreamedBatches:
    """The global batches of a run over a stream, and one rank's share of each.

    Rank 0 reads, a block ahead of training on a thread, and hands each global batch to all ranks: what is
    trained on does not depend on their number, and a source is downloaded once. The steps are asked for in
    order.

    Args:
        stream: the examples; used by rank 0.
        shape: of the batches.
        on_main: runs a function on rank 0 and gives all ranks its result or its error.
        first_step: steps done before.
        start: where the stream stood after them, as `position` gave it; None: at its beginning.
    """

    def __init__(
        self,
        stream: ExampleStream,
        shape: BatchShape,
        on_main: Callable[[Callable[[], list[list[Example]]]], list[list[Example]]],
        first_step: int = 0,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self._stream, self._shape, self._on_main = stream, shape, on_main
        begin = Position(**(start or {}))
        # Of the step that is taken, which may not come to its end, and of the one after it.
        self._positions = {first_step: begin}
        self._blocks = stream.blocks(begin)
        self._offset = begin.offset
        self._block: Block | None = None
        self._next_block: Future[Block] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._report = DatasetReport(**begin.report)

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of global batch `step`.

        Raises:
            DataError: the records to come cannot be used.
        """
        return self._shape.micro_batches(self._on_main(lambda: self._take(step)), step)

    @property
    def report(self) -> DatasetReport:
        """On rank 0: what became of the rows read so far, over all passes and to the end of the block."""
        return self._report

    def position(self, step: int) -> dict[str, Any]:
        """On rank 0: where the stream stands after `step` steps, the last one taken or the one before it."""
        return asdict(self._positions[step])

    def close(self) -> None:
        """Ends the reading."""
        self._stream.close()
        self._thread.shutdown(cancel_futures=True)

    def open(self) -> None:
        """On rank 0: reads to where the first step begins.

        Raises:
            DataError: the records are not those of the checkpoint, or cannot be used.
        """
        self._advance()

    def _take(self, step: int) -> list[list[Example]]:
        size, taken = self._shape.global_batch_size, list[list[Example]]()
        block = self._block or self._advance()
        while True:
            more = block.rows[self._offset : self._offset + size - len(taken)]
            taken += more
            self._offset += len(more)
            if len(taken) == size:
                break
            block, self._offset = self._advance(), 0
        after = block.position(self._offset)
        self._positions = {step: self._positions[step], step + 1: after}
        return taken

    def _advance(self) -> Block:
        next_block = self._next_block or self._thread.submit(next, self._blocks)
        with progress("waiting for records"):
            block = next_block.result()
        self._next_block = self._thread.submit(next, self._blocks)
        self._block, self._report = block, block.report
        return block
