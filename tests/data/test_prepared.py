"""Examples on the disk: as those in memory, made once, made anew when their source is another, never torn."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmlora_dist.data import (
    Dataset,
    DatasetReport,
    ExampleReader,
    open_prepared,
    prepare,
    prepared,
    rows_of_epoch,
)
from ssmlora_dist.data.contents import source_digest
from ssmlora_dist.errors import CheckpointError, DataError

ROWS = [{"instruction": "x" * n, "output": "y" * (n % 3), "id": n} for n in range(1, 40)]


class Source:
    """A file of records that is prepared under `cache`; what was said, and how often it was read."""

    def __init__(self, directory: Path, tokenizer: Any) -> None:
        self.file, self.cache = directory / "rows.jsonl", directory / "cache"
        self.said: list[str] = []
        self.num_reads = 0
        self._tokenizer = tokenizer
        self.write(ROWS)

    def write(self, rows: list[Any]) -> None:
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reader(self) -> ExampleReader:
        reader = ExampleReader(
            format="instruction",
            tokenizer=self._tokenizer,
            max_length=48,
            partition="train",
            path=str(self.file),
        )
        read = reader.read

        def counted(*arguments: Any) -> Iterator[Any]:
            self.num_reads += 1
            return read(*arguments)

        reader.read = counted  # type: ignore[method-assign]
        return reader

    def prepare(self, **settings: Any) -> Path:
        return prepare(
            self.reader(), self.cache, settings, lambda: source_digest([self.file]), self.said.append
        )

    @property
    def kept(self) -> list[str]:
        return sorted(path.name for path in self.cache.iterdir())


def in_memory(reader: ExampleReader) -> Dataset:
    """The examples of a reader, which never were on the disk."""
    examples, reports = zip(*reader.read(), strict=True)
    report = sum(reports, DatasetReport())
    return Dataset(list(itertools.chain(*examples)), report, frozenset(reader.closings))


@pytest.fixture
def source(tmp_path: Path, byte_tokenizer: Any) -> Source:
    return Source(tmp_path, byte_tokenizer)


def test_examples_are_those_in_memory(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "BATCH_EXAMPLES", 4)
    expected, found = in_memory(source.reader()), open_prepared(source.prepare())
    assert len(found) == len(expected) > 8
    for one, other in zip(found.examples, expected.examples, strict=True):
        for name in ("input_ids", "labels"):
            ours, theirs = getattr(one, name), getattr(other, name)
            assert ours.dtype == theirs.dtype
            assert ours.tolist() == theirs.tolist()
        assert (one.num_scored, one.metadata) == (other.num_scored, other.metadata)
    assert [len(found.examples[part]) for part in (slice(3), slice(-2, None))] == [3, 2]
    for name in ("report", "closings", "num_targets", "sha256"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.report.num_dropped_too_long > 0
    assert found.report.unused_fields == {"id": len(ROWS)}
    assert np.array_equal(found.lengths, expected.lengths)


@pytest.mark.parametrize("row_tokens", [None, 48])
def test_rows_are_packed_by_lengths_alone(
    source: Source, monkeypatch: pytest.MonkeyPatch, row_tokens: int | None
) -> None:
    found = open_prepared(source.prepare())
    expected = [list(row) for row in rows_of_epoch(in_memory(source.reader()), 3, 1, row_tokens)]
    monkeypatch.setattr(type(found.examples), "__getitem__", None)
    rows = [list(row) for row in rows_of_epoch(found, 3, 1, row_tokens)]
    assert rows == expected
    assert sorted(itertools.chain(*rows)) == list(range(len(found)))


def test_a_source_is_read_once(source: Source) -> None:
    assert source.prepare() == source.prepare()
    assert (source.num_reads, source.said) == (1, [])
    assert source.prepare(max_length=9) != source.prepare()
    assert (source.num_reads, source.said) == (2, [])


def test_other_contents_of_the_same_size_and_time_are_prepared_and_said(source: Source) -> None:
    first, stat = source.prepare(), source.file.stat()
    source.write([{**ROWS[0], "instruction": "z"}, *ROWS[1:]])
    os.utime(source.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.file.stat().st_size == stat.st_size
    second = source.prepare()
    assert open_prepared(second).sha256 != open_prepared(first).sha256
    [line] = source.said
    assert line == f"{source.file}: is not what it was when it was last prepared; it is prepared anew"


def test_code_that_has_changed_prepares_anew(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    first = source.prepare()
    monkeypatch.setattr(prepared, "_versions", lambda: {"tokenizers": "another"})
    assert source.prepare() != first


def test_what_a_kill_has_left_is_not_read(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill while it is written, which cleans nothing up."""
    with monkeypatch.context() as killed:
        killed.setattr(prepared.shutil, "rmtree", lambda *_, **__: None)
        killed.setattr(prepared, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            source.prepare()
    [left] = source.kept
    assert left.endswith(".partial")
    assert (source.cache / left / prepared.EXAMPLES_FILE).stat().st_size > 0
    path = source.prepare()
    assert len(open_prepared(path)) == len(in_memory(source.reader()))
    assert source.kept == sorted([left, path.name]), "of another process, perhaps, that is still writing"
    old = time.time() - prepared.LEFTOVER_SECONDS - 1
    for each in (source.cache / left, source.cache / left / prepared.EXAMPLES_FILE):
        os.utime(each, (old, old))
    assert left not in (source.prepare(other=1) and source.kept)


@pytest.mark.parametrize("file", [prepared.EXAMPLES_FILE, prepared.MANIFEST_FILE])
def test_a_damaged_file_is_made_anew(source: Source, file: str) -> None:
    path = source.prepare()
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    assert source.prepare() == path
    assert (path / file).read_bytes() == whole
    assert source.num_reads == 2


def test_a_corrupt_record_is_named_and_leaves_nothing(source: Source) -> None:
    source.file.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is not valid JSON"):
        source.prepare()
    assert source.kept == []


def test_a_source_without_examples_leaves_nothing(source: Source) -> None:
    source.write([{"instruction": "x", "output": ""}])
    with pytest.raises(DataError, match="nothing is left of 1 rows"):
        source.prepare()
    assert source.kept == []


def test_a_source_that_changes_while_it_is_read_is_refused(source: Source) -> None:
    digests = iter(["one", "another"])
    with pytest.raises(DataError, match="has changed while it was read; start again"):
        prepare(source.reader(), source.cache, {}, lambda: next(digests), source.said.append)
    assert source.kept == []


def test_another_process_that_was_faster_is_no_error(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    write = prepared._write

    def slow(reader: Any, directory: Path) -> None:
        write(reader, directory)
        if source.num_reads == 1:
            source.prepare()

    monkeypatch.setattr(prepared, "_write", slow)
    path = source.prepare()
    assert source.num_reads == 2
    assert source.kept == [path.name]
    assert open_prepared(path).report.num_rows == len(ROWS)


def test_a_directory_that_cannot_be_written_is_an_error_with_a_remedy(source: Source) -> None:
    source.cache.write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*choose another data\.cache_dir"):
        source.prepare()
