"""Bad input through the scripts themselves: exit code 2, place and remedy in the message, nothing left."""

from __future__ import annotations

import pytest

from .cases import BAD, MENDED, TAKEN, UNFIT
from .conftest import REAL, Outcomes
from .processes import Finished


def assert_refused(finished: Finished, fragments: tuple[str, ...]) -> None:
    assert finished.exit_code == 2, finished.stderr
    assert finished.stderr.startswith(("error: ", "usage: "))
    for fragment in fragments:
        assert fragment in finished.stderr
    assert "Traceback" not in finished.stderr
    # What only the weights show is found after the run has said what it is.
    assert finished.stdout == "" or finished.stdout.startswith(("compute dtype ", "device "))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(outcomes: Outcomes, name: str) -> None:
    assert_refused(outcomes.refused[name], BAD[name].fragments)


@pytest.mark.parametrize("name", REAL)
def test_in_a_process_of_its_own(outcomes: Outcomes, name: str) -> None:
    assert_refused(outcomes.real[name], BAD[name].fragments)


@pytest.mark.parametrize("name", TAKEN)
def test_what_another_run_or_a_person_left_is_not_touched(outcomes: Outcomes, name: str) -> None:
    assert_refused(outcomes.refused[name], TAKEN[name].fragments)
    [kept] = (outcomes.directory / "runs" / name).iterdir()
    assert kept.read_text() == {"taken": "", "notes": "mine"}[name]


def test_refused_and_dry_runs_leave_nothing(outcomes: Outcomes) -> None:
    """Neither a run directory, which would block the next try, nor anything elsewhere."""
    assert {entry for entry in outcomes.new_entries if not entry.startswith(f"runs/{MENDED}")} == set()


def test_the_same_name_works_once_the_input_is_mended(outcomes: Outcomes) -> None:
    assert outcomes.mended.exit_code == 0, outcomes.mended.stderr
    assert (outcomes.directory / "runs" / MENDED / "summary.json").exists()


@pytest.mark.parametrize("name", UNFIT)
def test_generation_refuses_what_does_not_fit(outcomes: Outcomes, name: str) -> None:
    assert_refused(outcomes.unfit[name], UNFIT[name].fragments)
