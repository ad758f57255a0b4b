"""`--dry-run` and `--help`; that neither leaves anything is tested with bad input."""

from __future__ import annotations

import json

from ssmlora_dist.config.loading import load_config

from .conftest import Outcomes
from .materials import CONFIG_FILE


def test_a_dry_run_shows_the_resolved_configuration_and_what_follows(outcomes: Outcomes) -> None:
    finished = outcomes.dry_run
    assert finished.exit_code == 0, finished.stderr
    assert finished.stderr == ""
    resolved, end = json.JSONDecoder().raw_decode(finished.stdout)
    expected = load_config(
        outcomes.directory / CONFIG_FILE,
        ["run.name=dry", "training.max_steps=3", "adapter.rank=4"],
        world_size=1,
        check_files=False,
    )
    assert resolved == expected.model_dump(mode="json", by_alias=True)
    lines = finished.stdout[end:].split("\n")
    assert lines[1].startswith("device       cpu, ")
    facts = {line[:13].rstrip(): line[13:] for line in lines[2:]}
    # q_proj in layer 0 and v_proj in layer 1: 4 x (16 + 16) + 2 x 16, and 4 x (16 + 8) + 2 x 16.
    assert facts["parameters"].startswith("288 trained, ")
    assert facts["computes in"].startswith("float32, ")
    assert facts["batch"] == "2 = 1 ranks x 2 micro-batches x 1 sequences"
    assert facts["train"].startswith("4 examples of 4 rows")
    assert facts["steps"] == "3 = 1.50 epochs of 4 examples"
    assert facts["writes to"] == "runs/dry"
    assert facts["begins"] == "at step 0"


def test_a_dry_run_counts_the_rows(outcomes: Outcomes) -> None:
    finished = outcomes.dry_run_counts
    assert finished.exit_code == 0, finished.stderr
    train, validation = (
        line for line in finished.stdout.splitlines() if line.startswith(("train ", "validation "))
    )
    assert train.endswith("1 examples of 2 rows; left out: 1 longer than max_length")
    assert validation.endswith("2 examples of 3 rows; left out: 1 without an answer")
    assert finished.stderr.splitlines() == [
        "warning: data.train: 1 of 2 rows are left out: 1 longer than max_length; raise `data.max_length` or "
        "set `data.too_long` to 'truncate'",
        "warning: data.validation: 1 of 3 rows are left out: 1 without an answer; check `fields` and "
        "`answer`",
    ]


def test_a_run_begins_with_what_a_dry_run_says(outcomes: Outcomes) -> None:
    lines = outcomes.mended.stdout.splitlines()
    assert lines[0].startswith("device       cpu, ")
    assert "writes to    runs/model-truncated" in lines
    names = [line[:13].rstrip() for line in outcomes.dry_run.stdout.split("\n}\n")[1].splitlines()]
    assert [line[:13].rstrip() for line in lines[: len(names)]] == names


def test_help_names_the_arguments(outcomes: Outcomes) -> None:
    assert outcomes.help.exit_code == 0
    for argument in ("--config", "--set", "--dry-run", "--log-level"):
        assert argument in outcomes.help.stdout
    # The launcher's own is nobody's business.
    assert "local_rank" not in outcomes.help.stdout
