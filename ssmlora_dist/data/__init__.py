"""Data: records read from files or a hub, formats, rows of text, examples, batches."""

from __future__ import annotations

from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.building import ExampleReader, Partition, RowReader
from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.data.collation import collate
from ssmlora_dist.data.examples import Dataset, Example
from ssmlora_dist.data.formats import FORMATS
from ssmlora_dist.data.loader import (
    BatchShape,
    EvaluationBatch,
    GlobalBatches,
    evaluation_batches,
    num_steps_of,
    rows_of_epoch,
)
from ssmlora_dist.data.prepared import default_directory, open_prepared, prepare
from ssmlora_dist.data.rows import Row, Segment
from ssmlora_dist.data.sources import resolve_revision
from ssmlora_dist.data.streaming import ExampleStream, StreamedBatches

__all__ = [
    "FORMATS",
    "BatchShape",
    "ChatTemplate",
    "Dataset",
    "DatasetReport",
    "EvaluationBatch",
    "Example",
    "ExampleReader",
    "ExampleStream",
    "GlobalBatches",
    "Partition",
    "Row",
    "RowReader",
    "Segment",
    "StreamedBatches",
    "collate",
    "default_directory",
    "evaluation_batches",
    "num_steps_of",
    "open_prepared",
    "prepare",
    "resolve_revision",
    "rows_of_epoch",
]
