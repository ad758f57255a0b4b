"""The benchmark of preparing data: what a rank finds, at a first and a second start, and the rows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import data_preparation
from ssmlora_dist.distributed import context as contexts
from ssmlora_dist.ranks import OF_A_RANK

NUM_RECORDS = 40


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, which needs no process group and starts as this process."""

    def act(action: Any) -> Any:
        return action()

    def start(work: Path, num_ranks: int) -> Any:
        out = work / "found.json"
        data_preparation.measure(work, num_ranks, out)
        return json.loads(out.read_text())

    rank = {"rank": 0, "world_size": 1, "is_main": True, "gather": lambda value: [value]}
    context = SimpleNamespace(**rank, on_main=act, on_each_node=act)
    # Other tests of this process may have been ranks.
    for name in OF_A_RANK:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(contexts, "start_process_group", lambda timeout: context)
    monkeypatch.setattr(contexts, "stop_process_group", lambda: None)
    monkeypatch.setattr(data_preparation, "_start", start)
    monkeypatch.setattr(data_preparation, "NUM_BATCHES", 2)
    monkeypatch.setattr(data_preparation, "VOCABULARY", 300)


def test_each_start_is_a_row(alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "rows.jsonl"
    arguments = [f"--records={NUM_RECORDS}", "--ranks=1", f"--work-dir={tmp_path}", f"--out={out}"]
    monkeypatch.setattr("sys.argv", ["data_preparation.py", *arguments])
    assert data_preparation.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["start"], row["num_ranks"], row["num_records"]) for row in rows] == [
        ("first", 1, NUM_RECORDS),
        ("second", 1, NUM_RECORDS),
    ]
    assert all(row["seconds"][0] > 0 and row["batch_milliseconds"][0] > 0 for row in rows)
    assert len(list((tmp_path / "cache" / "ssmlora_dist").iterdir())) == 1, "the second start reads it"
