"""Data: records read from files or a hub, formats, the generated retrieval task, batches."""

from __future__ import annotations

from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.building import ExampleReader, Partition, generate_dataset, read_dataset
from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.data.collation import collate
from ssmlora_dist.data.contents import examples_digest
from ssmlora_dist.data.examples import IGNORE_INDEX, Dataset, Example
from ssmlora_dist.data.formats import FORMATS
from ssmlora_dist.data.loader import (
    BatchShape,
    EvaluationBatch,
    GlobalBatches,
    evaluation_batches,
    num_steps_of,
    rows_of_epoch,
)
from ssmlora_dist.data.retrieval import generate_retrieval
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
    "StreamedBatches",
    "collate",
    "evaluation_batches",
    "examples_digest",
    "generate_dataset",
    "generate_retrieval",
    "num_steps_of",
    "read_dataset",
    "resolve_revision",
    "rows_of_epoch",
]
