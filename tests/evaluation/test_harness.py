"""The standard harness itself on an adapted model, and our benchmark against it; both offline."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.evaluation.items import ChoiceItem, Task
from ssmlora_dist.evaluation.metrics import choice_accuracy
from ssmlora_dist.evaluation.runner import run
from ssmlora_dist.models.tokenizer import load_tokenizer
from tests.tiny import SEED, adapted_model

lm_eval = pytest.importorskip("lm_eval")

VOCAB_SIZE = 259


def make_records(count: int) -> list[dict[str, Any]]:
    draw = random.Random(SEED)
    text = lambda: "".join(draw.choice("abcdefgh") for _ in range(draw.randrange(2, 9)))  # noqa: E731
    return [
        {"question": text(), "answers": [text() for _ in range(3)], "label": draw.randrange(3)}
        for _ in range(count)
    ]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
def test_a_task_of_the_harness_has_our_accuracies_on_an_adapted_model(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    records = make_records(20)
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    model, tokenizer = adapted_model(vocab_size=VOCAB_SIZE), load_tokenizer("bytes")
    config = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = lm_eval.simple_evaluate(harness, tasks=[config], bootstrap_iters=0)["results"]["local"]
    items = [
        ChoiceItem(
            str(i), f"Question: {r['question']}\nAnswer:", tuple(f" {a}" for a in r["answers"]), r["label"]
        )
        for i, r in enumerate(records)
    ]
    task = Task("local", lambda: iter(items), choice_accuracy, "acc")
    rows = run([task], model, tokenizer, max_batch_tokens=500)
    for metric in ("acc", "acc_norm"):
        ours = sum(row["scores"][metric] for row in rows) / len(rows)
        assert found[f"{metric},none"] == pytest.approx(ours, abs=1e-9), metric
    assert 0 < found["acc,none"] < 1
    assert found["acc,none"] != found["acc_norm,none"], "told apart"


def test_the_benchmark_finds_agreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import harness_parity

    out = tmp_path / "rows.jsonl"
    arguments = ["--model=tiny", "--items=3", "--timed-items=2", "--repeats=1", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["harness_parity.py", *arguments])
    monkeypatch.setattr(harness_parity, "ARTICLE_WORDS", 20)
    # Nothing that runs for milliseconds is timed to a purpose.
    monkeypatch.setattr(harness_parity, "SPEEDUP_FLOOR", 0.0)
    assert harness_parity.main() == 0
    *rows, timed = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["state"], row["task"]) for row in rows] == [
        (state, task) for state in ("base", "adapted") for task in harness_parity.TASKS
    ]
    assert all(row["agrees"] and row["max_abs_difference"] <= 1e-3 for row in rows)
    assert all(row["lm_eval"] and row["environment"]["packages"]["torch"] for row in rows)
    assert set(timed["wall_seconds"]) >= {"ours", "harness, batch size 1"}

    monkeypatch.setattr(harness_parity, "TOLERANCE", 0.0)
    assert harness_parity.main() == 1, "a difference is found where there is one"
