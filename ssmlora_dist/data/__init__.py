"""Data: records read from files or a hub, formats, the generated retrieval task, batches."""

from __future__ import annotations

from ssmlora_dist.data.building import build_dataset
from ssmlora_dist.data.collation import collate
from ssmlora_dist.data.examples import IGNORE_INDEX, Dataset, DatasetReport, Example
from ssmlora_dist.data.formats import FORMATS
from ssmlora_dist.data.loader import EvaluationBatch, GlobalBatches, evaluation_batches
from ssmlora_dist.data.retrieval import generate_retrieval

__all__ = [
    "FORMATS",
    "IGNORE_INDEX",
    "Dataset",
    "DatasetReport",
    "EvaluationBatch",
    "Example",
    "GlobalBatches",
    "build_dataset",
    "collate",
    "evaluation_batches",
    "generate_retrieval",
]
