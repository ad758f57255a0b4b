"""What a run says of its records: at the start, once more as a stream goes on, and in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.models.tokenizer import load_tokenizer
from ssmlora_dist.training.data import RunData
from ssmlora_dist.training.resume_point import ResumePoint
from ssmlora_dist.training.topology import ParallelDims

CONFIG = Path(__file__).parents[2] / "configs" / "debug_tiny.json"
LONG = {"instruction": "x" * 500, "output": "y", "id": 1}
SHORT = {"instruction": "x", "output": "y"}
UNVALIDATED = ("data.validation=null", "evaluation.every_steps=null")


def run_data(directory: Path, records: list[Any], *overrides: str) -> tuple[RunData, list[str]]:
    file = directory / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    source = json.dumps({"format": "instruction", "path": str(file), "shuffle_buffer_size": 4})
    settings = [f"data.train={source}", "data.max_length=64", "training.global_batch_size=2", *overrides]
    config = load_config(CONFIG, settings, world_size=1)
    context: Any = SimpleNamespace(
        rank=0,
        on_main=lambda action: action(),
        on_each_node=lambda action: action(),
        gather=lambda value: [value],
    )
    dims = ParallelDims(data_parallel_rank=0, data_parallel_size=1, stage=0, num_stages=1)
    said: list[str] = []
    resume_point = ResumePoint(None, None, False)
    return RunData(config, load_tokenizer("bytes"), context, dims, resume_point, said.append), said


def test_much_that_is_left_out_is_a_warning(tmp_path: Path) -> None:
    data, said = run_data(
        tmp_path, [SHORT, LONG, LONG], "data.validation=null", "evaluation.every_steps=null"
    )
    assert said == [
        "data.train: 2 of 3 rows are left out: 2 longer than max_length; raise `data.max_length` or set "
        "`data.too_long` to 'truncate'"
    ]
    assert data.accounts() == [
        "train        1 examples of 3 rows; left out: 2 longer than max_length",
        "             fields not used: id (in 2 of 3 records)",
    ]
    assert data.metrics()["data/train_num_dropped_too_long"] == 2.0
    data.micro_batches(0)
    assert len(said) == 1


def test_validation_is_warned_of_too(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text(json.dumps(SHORT) + "\n" + json.dumps({**SHORT, "output": ""}))
    source = json.dumps({"format": "instruction", "path": str(tmp_path / "validation.jsonl")})
    data, said = run_data(tmp_path, [SHORT], f"data.validation={source}")
    assert said == [
        "data.validation: 1 of 2 rows are left out: 1 without an answer; check `fields` and `answer`"
    ]
    assert data.accounts()[1] == "validation   1 examples of 2 rows; left out: 1 without an answer"
    assert data.metrics()["data/validation_num_without_target"] == 1.0


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_probe_has_the_first_micro_batches_of_training(
    tmp_path: Path, is_streamed: bool, micro_batch_size: int
) -> None:
    # More than a block of the stream, which is of 4 examples.
    records = [{"instruction": str(index), "output": "y"} for index in range(17)]
    overrides = [f"training.micro_batch_size={micro_batch_size}", "training.max_steps=9", *UNVALIDATED]
    data, _ = run_data(tmp_path, records, f"data.train.streaming={str(is_streamed).lower()}", *overrides)
    probed = data.probe_batches(7)
    trained = [batch for step in range(7) for batch in data.micro_batches(step)]
    data.close()
    assert len(probed) == 7
    assert len({str(batch.inputs["input_ids"]) for batch in probed}) == 7
    for found, expected in zip(probed, trained[:7], strict=True):
        assert torch.equal(found.targets, expected.targets)
        assert found.inputs.keys() == expected.inputs.keys()
        assert all(torch.equal(found.inputs[name], tensor) for name, tensor in expected.inputs.items())


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_longest_rows_are_found_and_the_order_stays(tmp_path: Path, is_packed: bool) -> None:
    lengths = [3, 20, 9, 31, 14, 5]
    records = [{"instruction": "x" * length, "output": "y"} for length in lengths]
    overrides = ["training.micro_batch_size=2", "adapter.dropout=0.1", *UNVALIDATED]
    data, _ = run_data(tmp_path, records, f"data.packing={str(is_packed).lower()}", *overrides)
    first = data.micro_batches(0)
    longest = data.longest_micro_batch()
    known = data.sample.lengths
    rows, tokens = longest.shape
    assert rows == 2
    # Of one example, or of several that fill a row.
    assert tokens == max(known) if not is_packed else max(known) < tokens <= 64
    if not is_packed:
        assert longest.num_tokens - longest.num_padding == sum(sorted(known)[-2:])
    assert longest.inputs.keys() == first[0].inputs.keys()
    for before, after in zip(first, data.micro_batches(0), strict=True):
        assert all(torch.equal(before.inputs[name], after.inputs[name]) for name in before.inputs)


@pytest.mark.parametrize("first_bad", [0, 8])
def test_a_stream_warns_once_as_soon_as_it_shows(tmp_path: Path, first_bad: int) -> None:
    records = [SHORT] * first_bad + [SHORT, LONG] * 8
    data, said = run_data(
        tmp_path, records, "data.train.streaming=true", "training.max_steps=9", *UNVALIDATED
    )
    assert data.accounts()[0].startswith("train        streamed; of the first rows: 4 examples of ")
    assert len(said) == int(first_bad == 0)
    for step in range(8):
        data.micro_batches(step)
    data.close()
    (warning,) = said
    assert warning.startswith("data.train: of what is read so far, ")
