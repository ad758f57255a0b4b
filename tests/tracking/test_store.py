"""Where runs are recorded: what is said, by whom, and what can be seen to be wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ssmlora_dist.tracking import Store, choose_store

URI = {"MLFLOW_TRACKING_URI": "http://server"}
NAME = {"MLFLOW_EXPERIMENT_NAME": "theirs"}
NUMBER = {"MLFLOW_EXPERIMENT_ID": "7"}


def problem(tmp_path: Path, uri: str | None) -> str:
    return choose_store(tmp_path, uri, None, {}).problem() or ""


def test_the_configuration_comes_before_the_environment_and_that_before_ours(tmp_path: Path) -> None:
    ours = choose_store(tmp_path, environment={})
    assert (ours.uri, ours.uri_from) == (f"sqlite:///{tmp_path}/mlflow.db", "run.output_dir")
    assert (ours.experiment, ours.experiment_from) == ("ssmlora_dist", "tracking.experiment")
    theirs = choose_store(tmp_path, environment=URI | NAME)
    assert (theirs.uri, theirs.uri_from) == ("http://server", "MLFLOW_TRACKING_URI")
    assert (theirs.experiment, theirs.experiment_from) == ("theirs", "MLFLOW_EXPERIMENT_NAME")
    given = choose_store(tmp_path, "http://other", "mine", URI | NAME | NUMBER)
    assert (given.uri, given.uri_from) == ("http://other", "tracking.uri")
    assert (given.experiment, given.experiment_id) == ("mine", None)
    numbered = choose_store(tmp_path, environment=NUMBER)
    assert (numbered.experiment, numbered.experiment_id) == (None, "7")
    assert numbered.experiment_from == "MLFLOW_EXPERIMENT_ID"
    empty = {"MLFLOW_TRACKING_URI": "", "MLFLOW_EXPERIMENT_NAME": "", "MLFLOW_EXPERIMENT_ID": ""}
    assert choose_store(tmp_path, environment=empty) == ours


def test_what_was_chosen_and_why_is_said_without_passwords(tmp_path: Path) -> None:
    store = choose_store(tmp_path, environment={"MLFLOW_TRACKING_URI": "https://me:secret@server"} | NAME)
    assert str(store) == (
        'https://***@server (MLFLOW_TRACKING_URI), experiment "theirs" (MLFLOW_EXPERIMENT_NAME)'
    )
    assert store.record() == {
        "uri": "https://***@server",
        "uri_from": "MLFLOW_TRACKING_URI",
        "experiment": "theirs",
        "experiment_from": "MLFLOW_EXPERIMENT_NAME",
    }
    assert str(choose_store(tmp_path, "http://a", environment=NUMBER)).endswith(
        "experiment 7 (MLFLOW_EXPERIMENT_ID)"
    )


def test_where_a_store_keeps_its_files(tmp_path: Path) -> None:
    def files(uri: str | None) -> str | None:
        return choose_store(tmp_path, uri, environment={}).artifact_location

    assert files(None) == f"file://{tmp_path}/mlartifacts"
    assert files("sqlite:////data/runs.db") == "file:///data/mlartifacts"
    assert files("sqlite:///data/runs.db") == f"file://{Path.cwd()}/data/mlartifacts"
    assert files("postgresql+psycopg2://user@host/db") == f"file://{tmp_path}/mlartifacts"
    assert files("https://server") is None
    assert files("databricks") is None


def test_a_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert choose_store(tmp_path, "sqlite:///~/runs.db", environment={}).uri == "sqlite:////home/me/runs.db"
    assert "no such user" in problem(tmp_path, "sqlite:///~nobody-here/runs.db")


def test_stores_that_can_be(tmp_path: Path) -> None:
    (tmp_path / "runs.db").write_bytes(b"SQLite format 3\0...")
    (tmp_path / "empty.db").touch()
    for uri in (
        None,
        f"sqlite:///{tmp_path}/runs.db",
        f"sqlite:///{tmp_path}/empty.db",
        f"sqlite:///{tmp_path}/new/deep/runs.db?timeout=5",
        "sqlite+pysqlite:///runs.db",
        "http://server:5000/prefix",
        "https://me:secret@server",
        "databricks",
    ):
        assert problem(tmp_path, uri) == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite://", "sqlite:///FILE"),
        ("sqlite:/runs.db", "sqlite:///FILE"),
        ("SQLITE:///runs.db", "sqlite:///FILE"),
        ("sqlite:///", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///{dir}", "is a directory"),
        ("sqlite:///{dir}/text/runs.db", "text is a file"),
        ("sqlite:///{dir}/text", "no SQLite database"),
        ("sqlite:///{dir}/what?/runs.db", "has a `?`"),
        ("sqlite:///{dir}/what?a=b/runs.db", "has a `?`"),
        ("sqlite:///{dir}/a%3Fb/runs.db", "has %3F"),
        ("sqlite:///{dir}/\0/runs.db", "null"),
        ("sqlite:///{dir}/" + "x" * 5000, "File name too long"),
        ("http://", "names no host"),
        ("http:/server", "names no host"),
        ("http://[x", "IPv6"),
        ("http://server:port", "Port"),
    ],
)
def test_stores_that_cannot_be(tmp_path: Path, uri: str, said: str) -> None:
    (tmp_path / "text").write_text("no database, but a text of some length")
    line = problem(tmp_path, uri.format(dir=tmp_path))
    assert line.startswith("tracking.uri: ")
    assert said in line
    assert len(line) < 1000


def test_a_name_that_mlflow_takes_for_no_experiment(tmp_path: Path) -> None:
    fits, told = "e" * 500, {"MLFLOW_EXPERIMENT_NAME": "e" * 501}
    assert choose_store(tmp_path, experiment=fits, environment={}).problem() is None
    assert choose_store(tmp_path, environment=told).problem() == (
        "MLFLOW_EXPERIMENT_NAME: a name of 501 characters given; allowed: at most 500; shorten it"
    )


@pytest.mark.parametrize(
    ("locked", "said"),
    [("runs.db", "is a file that cannot be written"), ("", "lies in a directory that cannot be written")],
)
def test_a_store_that_may_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: str, said: str
) -> None:
    (tmp_path / "runs.db").write_bytes(b"SQLite format 3\0...")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / locked)
    assert said in problem(tmp_path, f"sqlite:///{tmp_path}/runs.db")


@pytest.mark.parametrize(("name", "said"), [("what?", "has a `?`"), ("a%20b", "has %20")])
def test_an_output_directory_that_no_uri_can_name(tmp_path: Path, name: str, said: str) -> None:
    store: Store = choose_store(tmp_path / name, environment={})
    line = store.problem() or ""
    assert line.startswith(f"run.output_dir: {json.dumps(store.uri)} {said}")
    assert "tracking.uri" in line
