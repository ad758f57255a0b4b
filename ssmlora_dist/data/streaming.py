"""Data that are read as training goes on: shuffled block by block, continued at the exact example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from ssmlora_dist.data.building import ExampleReader
from ssmlora_dist.data.examples import Dataset, DatasetReport, Example
from ssmlora_dist.data.loader import BatchShape, permutation
from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import progress


@dataclass(frozen=True)
class Position:
    """Where in a stream training stands, in JSON types.

    Attributes:
        epoch: passes over the source that are complete.
        num_records: records of this pass that come before the block.
        offset: examples of the block that are used.
        report: what became of the rows of all blocks before this one, as `DatasetReport`.
    """

    epoch: int = 0
    num_records: int = 0
    offset: int = 0
    report: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Examples that are shuffled among each other: those of consecutive records.

    Attributes:
        begin: position of its first example.
        examples: in the order of training.
        report: what became of the rows of this block and all before it.
    """

    begin: Position
    examples: list[Example]
    report: DatasetReport


class ExampleStream:
    """The examples of a source as an endless row of blocks, pass after pass.

    A block takes whole records until it has `block_size` examples; its order is a function of the seed, the
    pass and the number of its first record. So the row is the same wherever it is begun.

    Args:
        reader: of the source.
        block_size: how many examples are shuffled among each other; 1: none.
        seed: of the order.
    """

    def __init__(self, reader: ExampleReader, block_size: int, seed: int) -> None:
        self._reader, self._block_size, self._seed = reader, block_size, seed
        self._closed = False

    def sample(self) -> Dataset:
        """The first block with examples, and what became of the rows that it took.

        Raises:
            DataError: as of `blocks`.
        """
        with progress(f"reading the first records of {self._reader.name}"):
            first = next(block for block in self.blocks(Position()) if block.examples)
        return Dataset(first.examples, first.report)

    def blocks(self, start: Position) -> Iterator[Block]:
        """The blocks from the one of `start` on.

        Raises:
            DataError: a record cannot be read or does not fit, a whole pass gave no example, or the source
                ends before `start`.
        """
        epoch, skip, report = start.epoch, start.num_records, DatasetReport(**start.report)
        while not self._closed:
            before = report
            for block in self._blocks_of_pass(epoch, skip, report):
                report = block.report
                yield block
            if skip and report == before:
                raise self.other_data(start)
            if not skip and report.num_examples == before.num_examples:
                raise self._reader.nothing_left(report)
            epoch, skip = epoch + 1, 0

    def close(self) -> None:
        """Ends the blocks at the next record."""
        self._closed = True

    def other_data(self, start: Position) -> DataError:
        """That what comes after `start` is not what it was when training stood there."""
        return DataError(
            f"{self._reader.name}: training is to go on in the examples that begin with record "
            f"{start.num_records + 1}, but there are fewer of them: the data are not those of the "
            "checkpoint; restore them, or begin anew under another run.name"
        )

    def _blocks_of_pass(self, epoch: int, skip: int, report: DatasetReport) -> Iterator[Block]:
        begin, examples, num_records = Position(epoch, skip, 0, asdict(report)), [], skip
        for of_record, its_report in self._reader.read(skip):
            if self._closed:
                return
            examples += of_record
            report += its_report
            num_records += 1
            if len(examples) >= self._block_size:
                yield self._block(begin, examples, report)
                begin, examples = Position(epoch, num_records, 0, asdict(report)), []
        if num_records > begin.num_records:
            yield self._block(begin, examples, report)

    def _block(self, begin: Position, examples: list[Example], report: DatasetReport) -> Block:
        order = permutation(len(examples), self._seed, begin.epoch, begin.num_records)
        return Block(begin, [examples[i] for i in order], report)


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
        on_main: Callable[[Callable[[], list[Example]]], list[Example]],
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

    def micro_batches(self, step: int) -> list[dict[str, Tensor]]:
        """This rank's micro-batches of global batch `step`, collated.

        Raises:
            DataError: the records to come cannot be used.
        """
        return self._shape.micro_batches(self._on_main(lambda: self._take(step)))

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

    def _take(self, step: int) -> list[Example]:
        size, taken = self._shape.global_batch_size, list[Example]()
        block = self._block or self._advance()
        if self._offset > len(block.examples):
            raise self._stream.other_data(block.begin)
        while True:
            more = block.examples[self._offset : self._offset + size - len(taken)]
            taken += more
            self._offset += len(more)
            if len(taken) == size:
                break
            block, self._offset = self._advance(), 0
        after = replace(block.begin, offset=self._offset)
        self._positions = {step: self._positions[step], step + 1: after}
        return taken

    def _advance(self) -> Block:
        next_block = self._next_block or self._thread.submit(next, self._blocks)
        with progress("waiting for records"):
            block = next_block.result()
        self._next_block = self._thread.submit(next, self._blocks)
        self._block, self._report = block, block.report
        return block
