"""Data: records read from files or a hub, formats, rows of text, examples, batches."""

from __future__ import annotations

from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.building import ExampleReader, Partition, RowReader, read_dataset
from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.data.collation import collate
from ssmlora_dist.data.examples import IGNORE_INDEX, Dataset, Example
from ssmlora_dist.data.formats import FORMATS
from ssmlora_dist.data.loader import (
    BatchShape,
    EvaluationBatch,
    GlobalBatches,
    evaluation_batches,
    num_steps_of,
)
from ssmlora_dist.data.prepared import can_prepare, default_directory, open_prepared, prepare
from ssmlora_dist.data.rows import Row, Segment
from ssmlora_dist.data.sources import resolve_revision
from ssmlora_dist.data.streaming import ExampleStream, StreamedBatches

__all__ = [
    "FORMATS",
    "IGNORE_INDEX",
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
    "can_prepare",
    "collate",
    "default_directory",
    "evaluation_batches",
    "num_steps_of",
    "open_prepared",
    "prepare",
    "read_dataset",
    "resolve_revision",
]
