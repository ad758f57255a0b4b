"""Paths as users write them: a home directory, and what the operating system refuses."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.arguments import build_adapter_parser, build_parser
from ssmlora_dist.config.paths import name_argument, path_argument
from ssmlora_dist.data.sources import find_files
from ssmlora_dist.errors import ConfigError, DataError, ModelError
from ssmlora_dist.models.location import locate
from ssmlora_dist.sweep.schema import load_sweep

from .conftest import Change, Load, Problems

LONG = "x" * 5000


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    return tmp_path


def test_a_home_is_expanded_wherever_a_path_may_stand(load: Load, home: Path) -> None:
    config = load(
        ("run.output_dir", "~/runs"),
        ("model", {"path": "~/model", "tokenizer": "~"}),
        ("data.train", {"format": "instruction", "path": "~/a.jsonl"}),
        ("data.validation", {"format": "text", "path": ["~/*.txt", "b.txt"]}),
        (
            "evaluation.tasks",
            [{"task": "passkey", "background": "~/t.txt"}, {"task": "rte", "path": "~/r.jsonl"}],
        ),
        check_files=False,
    )
    assert config.run.output_dir == home / "runs"
    assert (config.model.path, config.model.tokenizer) == (f"{home}/model", str(home))
    assert config.data.train.path == f"{home}/a.jsonl"
    assert config.data.validation is not None
    assert config.data.validation.path == (f"{home}/*.txt", "b.txt")
    assert config.evaluation.tasks[0].background == f"{home}/t.txt"
    assert config.evaluation.tasks[1].path == f"{home}/r.jsonl"
    # What is written down is read as it is.
    assert "~" not in json.dumps(config.model_dump(mode="json"))
    assert {path.name for path in home.iterdir()} == {"a.jsonl", "run.json"}


def test_a_sweep_s_paths_are_expanded(home: Path) -> None:
    (home / "sweep.json").write_text(
        json.dumps({"name": "s", "base": "~/base.json", "output_dir": "~/sweeps", "grid": {"a": [1]}})
    )
    sweep = load_sweep("sweep.json")
    assert sweep.base == f"{home}/base.json"
    assert sweep.output_dir == home / "sweeps"
    (home / "sweep.json").write_text(json.dumps({"name": "s", "base": "~nobody-here/base.json"}))
    with pytest.raises(ConfigError, match=r'base: "~nobody-here/base.json" given; "~nobody-here" is nobody'):
        load_sweep("sweep.json")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (("run.output_dir", "~nobody-here/runs"), "run.output_dir"),
        (("model", {"path": "~nobody-here/m"}), "model.path"),
        (("data.train", {"format": "text", "path": "~nobody-here/a.txt"}), "data.train.path"),
        (("data.train", {"format": "text", "path": ["a.jsonl", "~nobody-here"]}), "data.train.path.1"),
        (("evaluation.tasks", [{"task": "rte", "path": "~nobody-here"}]), "evaluation.tasks.0.path"),
    ],
)
def test_nobody_s_home(problems: Problems, change: Change, place: str) -> None:
    [line] = problems(change)
    assert line.startswith(f'{place}: "~nobody-here')
    assert "is nobody's home here" in line


@pytest.mark.parametrize(
    ("path", "reason"),
    [(LONG, "File name too long"), ("loop/x", "symbolic links"), ("a\0b", "null character")],
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.output_dir", lambda path: path),
        ("model", lambda path: {"path": path}),
        ("data.train", lambda path: {"format": "text", "path": path}),
        ("data.train", lambda path: {"format": "text", "path": ["a.jsonl", path]}),
        ("evaluation.tasks", lambda path: [{"task": "babilong_qa1", "path": path}]),
        ("evaluation.tasks", lambda path: [{"task": "passkey", "background": path}]),
    ],
)
def test_what_the_system_refuses_is_a_problem_of_its_key(
    problems: Problems, home: Path, key: str, value: Any, path: str, reason: str
) -> None:
    (home / "loop").symlink_to("loop")
    [line] = problems((key, value(path)))
    assert line.startswith(key)
    assert reason in line
    assert len(line) < 1000


def test_a_directory_that_may_not_be_looked_into(
    problems: Problems, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def refuse(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **named)

    monkeypatch.setattr(os, "stat", refuse)
    monkeypatch.setattr(Path, "stat", lambda self, **named: refuse(self, **named))
    lines = problems(
        ("run.output_dir", "secret/runs"),
        ("model", {"path": "./secret/model"}),
        ("data.train", {"format": "text", "path": "secret/a.txt"}),
    )
    assert [line.partition(":")[0] for line in lines] == ["run.output_dir", "model.path", "data.train.path"]
    assert all("Permission denied" in line for line in lines)
    # A checkpoint's configuration may name places that are not for everybody: it is only compared.
    assert load(("run.output_dir", "secret/runs"), check_files=False).run.output_dir == Path("secret/runs")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([("run.output_dir", "a.jsonl")], 'run.output_dir: "a.jsonl" given; "a.jsonl" is a file'),
        ([("run.output_dir", "a.jsonl/deep/runs")], 'run.output_dir: "a.jsonl/deep/runs" given; '),
        ([("run.name", "n" * 256)], "run.name: "),
    ],
)
def test_a_run_directory_that_cannot_be(problems: Problems, changes: list[Change], said: str) -> None:
    [line] = problems(*changes)
    assert line.startswith(said)


def test_paths_of_command_lines(home: Path) -> None:
    assert path_argument("~/x") == home / "x"
    assert name_argument("~/x") == f"{home}/x"
    # A dot says that it is no name on the hub.
    assert name_argument("./x") == "./x"
    assert name_argument("org/model") == "org/model"
    for text in (LONG, "~nobody-here/x"):
        with pytest.raises(argparse.ArgumentTypeError):
            path_argument(text)
    assert build_parser("").parse_args(["--config=~/c.json"]).config == home / "c.json"
    arguments = build_adapter_parser("").parse_args(["--adapter=~/a", "--model=~/m"])
    assert (arguments.adapter, arguments.model) == (home / "a", f"{home}/m")


def test_files_and_models_that_cannot_be_looked_for() -> None:
    with pytest.raises(DataError, match="File name too long"):
        find_files([LONG])
    with pytest.raises(ModelError, match="File name too long"):
        locate(f"/{LONG}", weights=False)
