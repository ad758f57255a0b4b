"""All examples of a source, by way of the disk, as a run has them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ssmlora_dist.data import Dataset, ExampleReader, RowReader, open_prepared, prepare


def read_dataset(reader: ExampleReader | RowReader) -> Dataset:
    """Prepares the examples of a reader; what is mapped into memory outlives its file's name."""
    with tempfile.TemporaryDirectory() as directory:
        return open_prepared(prepare(reader, Path(directory), {}, lambda: "contents", print))
