"""`launch/harness.py`: the standard harness on an adapter directory, offline, with a task of its own."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.files import write_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.models import base_fingerprint, load_model

from .materials import MODEL
from .processes import TRAIN_SCRIPT

pytest.importorskip("lm_eval")

SCRIPT = TRAIN_SCRIPT.with_name("harness.py")
BASE: dict[str, Any] = {
    "path": None,
    "init": "random",
    "config": MODEL,
    "seed": 0,
    "compute_dtype": "float32",
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = load_model(**{**BASE, "compute_dtype": torch.float32})
    config = AdapterConfig(rank=2)
    tensors = {name: p.detach() for name, p in adapter_parameters(add_adapters(model, config)).items()}
    known = {key: BASE[key] for key in ("init", "config", "seed")}
    write_adapter(
        tmp_path / "adapter",
        config,
        tensors,
        base={**BASE, "tokenizer": "bytes"},
        base_fingerprint=base_fingerprint(None, **known),
    )
    return tmp_path / "adapter"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"Is {i} even?", "label": i % 2} for i in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "parity_of_numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "parity.yaml").write_text(yaml.safe_dump(task))
    return tmp_path / "tasks"


def harness(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["harness.py", *arguments])
    return run_command(runpy.run_path(str(SCRIPT))["main"])


def test_the_table_is_shown_and_kept(
    adapter: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ("--adapter", str(adapter), "--include-path", str(tasks))
    out = tmp_path / "results.json"
    code = harness(monkeypatch, *common, "--tasks", "parity_of_numbers", "--limit", "10", "--out", str(out))
    assert code == 0
    result = json.loads(out.read_text())["results"]["parity_of_numbers"]
    assert 0 <= result["acc,none"] <= 1
    shown = capsys.readouterr().out
    assert "parity_of_numbers" in shown
    assert f"{result['acc,none']:.4f}".rstrip("0") in shown


def test_an_unknown_task_is_refused(
    adapter: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--adapter", str(adapter), "--include-path", str(tasks), "--tasks", "parity_of_nmbers")
    assert harness(monkeypatch, *arguments) == 2
    message = "--tasks parity_of_nmbers: lm-eval has no such task (nearest: parity_of_numbers)"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "0"), "--limit 0: allowed: 1 or more"),
        (("--batch-size", "-8"), "--batch-size -8: allowed: 1 or more"),
        (("--num-fewshot", "-1"), "--num-fewshot -1: allowed: 0 or more"),
        (("--adapter", "nowhere"), "--adapter nowhere: no such directory"),
        (("--include-path", "nowhere"), "--include-path nowhere: no such directory"),
        (("--out", "."), "--out .: is a directory; name a file in it"),
        (("--out", "file/results.json"), "file/results.json: cannot be written: "),
    ],
)
def test_bad_arguments_are_refused_before_the_work(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "file").write_text("")
    assert harness(monkeypatch, "--adapter", "adapter", "--tasks", "boolq", *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f": {message}" in line


def test_generation_ends_where_answers_end(
    adapter: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The harness generates with the model's own configuration; of texts that end answers it is warned."""
    from lm_eval.models.huggingface import HFLM

    settings = json.loads((adapter / "ssmlora.json").read_text())
    base = {**settings["base"], "end_token_ids": [33], "stop_texts": ["[end]"]}
    (adapter / "ssmlora.json").write_text(json.dumps({**settings, "base": base}))
    held: list[Any] = []
    construct = HFLM.__init__

    def hold(self: Any, *arguments: Any, **settings: Any) -> None:
        held.append(settings["pretrained"].generation_config)
        construct(self, *arguments, **settings)

    monkeypatch.setattr(HFLM, "__init__", hold)
    common = ("--adapter", str(adapter), "--include-path", str(tasks))
    assert harness(monkeypatch, *common, "--tasks", "parity_of_numbers", "--limit", "1") == 0
    assert (held[0].eos_token_id, held[0].stop_strings) == ([33, 257], None)
    assert "warning: answers end with '[end]', which is no token" in capsys.readouterr().err
