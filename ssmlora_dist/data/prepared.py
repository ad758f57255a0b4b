"""Examples that are made once and lie on the disk, in files of `datasets` that every rank maps into memory.

Those of a source lie in a directory, whose name is a digest of the settings that decide them and one of what
was read. It is written under another name and renamed when it is whole, so that what a kill leaves half
written is never read. What was read is known by its contents, all of them: a source that has changed, at the
same size and time too, is prepared anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ssmlora_dist.batches import IGNORED_LABEL
from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.building import ExampleReader, RowReader
from ssmlora_dist.data.examples import Dataset, Example, ExamplesDigest, StoredExamples
from ssmlora_dist.durable import explained, sync, write_text
from ssmlora_dist.errors import DataError
from ssmlora_dist.progress import progress

EXAMPLES_FILE, MANIFEST_FILE = "examples.arrow", "manifest.json"
# What is written at once: a few MB.
BATCH_TOKENS, BATCH_EXAMPLES = 1 << 20, 1000
# A process that writes does so more often.
LEFTOVER_SECONDS = 24 * 3600
DECIDING_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets")


def default_directory() -> Path:
    """Where prepared examples lie by default: beside what `datasets` keeps (HF_DATASETS_CACHE, HF_HOME)."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "ssmlora_dist"


def prepare(
    reader: ExampleReader | RowReader,
    directory: Path,
    settings: Mapping[str, Any],
    contents: Callable[[], str],
    warn: Callable[[str], object],
) -> Path:
    """Makes the examples of a source, unless they are there.

    Args:
        reader: of the source.
        directory: of all prepared examples.
        settings: what decides the examples beside the contents of the source, in JSON types.
        contents: digest of what is read.
        warn: told when the source has changed.

    Returns:
        The directory of these examples, for `open_prepared`.

    Raises:
        DataError: anything that keeps the data from being used, with file and line.
        CheckpointError: the directory cannot be written.
    """
    decided = _digest(json.dumps([settings, _versions()], sort_keys=True))
    with progress(f"comparing {reader.name} with what is prepared"):
        found = contents()
    path = directory / f"{decided}-{found[:16]}"
    if _is_whole(path):
        return path
    with explained(directory, "choose another data.cache_dir"):
        directory.mkdir(parents=True, exist_ok=True)
        if any(other != path for other in directory.glob(f"{decided}-*")):
            warn(f"{reader.name}: is not what it was when it was last prepared; it is prepared anew")
        _remove_leftovers(directory)
        beside = directory / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
        beside.mkdir()
        try:
            _write(reader, beside)
            if contents() != found:
                raise DataError(
                    f"{reader.name}: has changed while it was read; start again once it stays as it is"
                )
            _take_place(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return path


def open_prepared(path: Path) -> Dataset:
    """The examples in a directory that `prepare` gave."""
    manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    examples = StoredExamples(path / EXAMPLES_FILE, manifest["num_targets"], manifest["sha256"])
    return Dataset(examples, DatasetReport(**manifest["report"]), frozenset(manifest["closings"]))


def _write(reader: ExampleReader | RowReader, directory: Path) -> None:
    """Files of all examples, at least one.

    Raises:
        DataError: there is none, or a record cannot be used.
    """
    from datasets.arrow_writer import ArrowWriter

    report, digest, num_targets = DatasetReport(), ExamplesDigest(), 0
    waiting: list[Example] = []
    num_waiting = 0
    file = directory / EXAMPLES_FILE
    with (
        progress(f"preparing {reader.name}", unit="records") as shown,
        ArrowWriter(path=str(file), schema=_schema()) as writer,
    ):
        for of_record, its_report in reader.read():
            report += its_report
            for example in of_record:
                digest.add(example)
                num_targets += example.num_targets
                num_waiting += example.num_tokens
            waiting += of_record
            if num_waiting >= BATCH_TOKENS or len(waiting) >= BATCH_EXAMPLES:
                writer.write_table(_table(waiting))
                waiting, num_waiting = [], 0
            shown.update(report.num_rows, f"{report.num_examples:,} examples")
        if not report.num_examples:
            raise reader.nothing_left(report)
        if waiting:
            writer.write_table(_table(waiting))
        writer.finalize()
    manifest = {
        "report": asdict(report),
        "closings": sorted(reader.closings),
        "num_targets": num_targets,
        "sha256": digest.sha256,
        "num_bytes": file.stat().st_size,
    }
    sync(file)
    write_text(directory / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")


def _take_place(beside: Path, path: Path) -> None:
    if path.exists() and not _is_whole(path):
        shutil.rmtree(path)
    try:
        beside.rename(path)
    except OSError:
        # Another process was faster: what it has made is the same.
        if not _is_whole(path):
            raise
    sync(path.parent)


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
        return bool((path / EXAMPLES_FILE).stat().st_size == manifest["num_bytes"])
    except (OSError, ValueError, KeyError):
        return False


def _remove_leftovers(directory: Path) -> None:
    """What kills have left half written; what another process is writing stays."""
    for path in directory.glob(".*.partial"):
        with suppress(OSError):
            newest = max(each.stat().st_mtime for each in (path, *path.iterdir()))
            if time.time() - newest > LEFTOVER_SECONDS:
                shutil.rmtree(path)


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "input_ids": pa.list_(pa.int32()),
            "is_target": pa.list_(pa.bool_()),
            "num_scored": pa.int32(),
            "metadata": pa.string(),
        }
    )


def _table(examples: Sequence[Example]) -> Any:
    import pyarrow as pa

    offsets = pa.array(np.cumsum([0, *(example.num_tokens for example in examples)]), pa.int32())
    ids = np.concatenate([example.input_ids for example in examples])
    is_target = np.concatenate([example.labels for example in examples]) != IGNORED_LABEL
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(ids)),
        pa.ListArray.from_arrays(offsets, pa.array(is_target)),
        pa.array([example.num_scored for example in examples], pa.int32()),
        pa.array([json.dumps(dict(example.metadata)) for example in examples]),
    ]
    return pa.table(columns, schema=_schema())


@functools.cache
def _versions() -> dict[str, str]:
    """Of all code that decides examples; this package's is its very text, which changes without a release."""
    package = Path(__file__).parents[1]
    source = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        source.update(file.read_bytes())
    found = {"python": sys.version, "ssmlora_dist": source.hexdigest()}
    for name in DECIDING_PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
