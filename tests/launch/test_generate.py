"""`launch/generate.py` with the adapter of a run."""

from __future__ import annotations

import json

from .cases import ADAPTER
from .conftest import Outcomes


def test_a_prompt_is_answered_on_the_standard_output(outcomes: Outcomes) -> None:
    finished = outcomes.generated
    assert finished.exit_code == 0, finished.stderr
    assert finished.stderr == ""
    # Four new tokens of the tokenizer of bytes, as a model after one step answers, and the end of the line.
    assert finished.stdout.endswith("\n")
    assert len(finished.stdout.encode()) > 1
    assert "Say hi" not in finished.stdout


def test_a_run_records_what_ends_its_answers(outcomes: Outcomes) -> None:
    [checkpoint] = (outcomes.directory / ADAPTER).parent.glob("checkpoints/step-*")
    for directory in (outcomes.directory / ADAPTER, checkpoint):
        base = json.loads((directory / "ssmlora.json").read_text())["base"]
        assert (base["end_token_ids"], base["stop_texts"]) == ([257], [])
