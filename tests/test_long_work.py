"""Everything that can take long tells how far it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmlora_dist import AdapterConfig, add_adapters, save_adapter
from ssmlora_dist.data import BatchShape, ExampleReader, ExampleStream, Row, RowReader, Segment
from ssmlora_dist.models import base_fingerprint, load_model, load_tokenizer
from ssmlora_dist.models.loss import Scores
from ssmlora_dist.models.merging import merge_adapter
from ssmlora_dist.progress import shown_by
from ssmlora_dist.training.evaluation import evaluate

from .examples import read_dataset
from .tiny import tiny_model
from .told import Told

NUM_ROWS = 7
Updates = list[tuple[str, int, int | None]]


@pytest.fixture
def told() -> Any:
    told = Told()
    with shown_by(told):
        yield told
    assert told.ended == [(work.description, True) for work in told.works]


def reader(directory: Path) -> ExampleReader:
    file = directory / "rows.jsonl"
    rows = [{"instruction": "Say hi.", "output": "hi" if i % 2 else ""} for i in range(NUM_ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"format": "instruction", "path": str(file), "partition": "train"}
    return ExampleReader(**settings, tokenizer=load_tokenizer("bytes"), max_length=128)


def test_reading(told: Told, tmp_path: Path) -> None:
    source = reader(tmp_path)
    read_dataset(source)
    name = f"preparing {source.name}"
    assert told.updates == [(name, number, None) for number in range(1, NUM_ROWS + 1)]
    assert told.figures[name] == (f"{NUM_ROWS // 2} examples",)
    compared, made = told.works
    assert compared.description == f"comparing {source.name} with what is prepared"
    assert made.unit == "records"
    ExampleStream(source, 2, seed=0).sample()
    assert told.works[2].description == f"reading the first records of {source.name}"


def test_generating(told: Told) -> None:
    rows = [Row("here", (Segment("a"), Segment("b", is_target=True)))] * 3
    reader = RowReader(
        "passkey", lambda: iter(rows), tokenizer=load_tokenizer("bytes"), max_length=8, too_long="drop"
    )
    read_dataset(reader)
    assert told.updates == [("preparing passkey", done, None) for done in (1, 2, 3)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A stored model of six layers and a head that is not tied."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_fingerprint_and_loading(model: Path, told: Told) -> None:
    base_fingerprint(str(model))
    assert told.updates == [("taking the fingerprint of the base model", 1, 1)]
    load_model(str(model), quantization="none", compute_dtype=torch.float32)
    # Embedding, layers, final norm, head.
    assert told.updates[1:] == [("loading the base model", done, 9) for done in range(1, 10)]
    load_model(str(model), quantization="nf4", compute_dtype=torch.float32)
    assert told.updates[-1] == ("loading and quantising the base model", 9, 9)


def test_merging(model: Path, told: Told, tmp_path: Path) -> None:
    lora = add_adapters(tiny_model(), AdapterConfig(method="lora", rank=2))
    save_adapter(lora, tmp_path / "adapter")
    count = merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(model))
    last = {description: (done, total) for description, done, total in told.updates}
    num_files = len(list((tmp_path / "merged").iterdir()))
    assert last["copying the base model"] == last["waiting for the disk"] == (num_files, num_files)
    assert last["merging"] == (count, count)


def test_evaluating(told: Told, tmp_path: Path) -> None:
    dataset = read_dataset(reader(tmp_path))
    del told.updates[:]

    def score(batches: Any) -> list[Any]:
        rows = [batch.shape[0] for batch in batches]
        return [Scores(torch.zeros(n), torch.ones(n), torch.ones(n, dtype=torch.bool)) for n in rows]

    evaluate(
        score,
        dataset,
        shape=BatchShape(2, 2, 0, 1, 0),
        sum_over_ranks=list,
        description="evaluation before training",
    )
    assert told.updates == [("evaluation before training", done, 2) for done in (0, 1, 2)]
