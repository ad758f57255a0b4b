"""Runs that are killed, starved of disk or tampered with: they leave what is whole, and go on or say why not.

`benchmarks/faults.py` does the same at a hundred random moments.
"""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.training.checkpoints import FILES, LATEST_FILE, read_checkpoint

from ..launch.processes import ON_CPU, run
from .harness import ALONE, RUN_NAME, SAVE_EVERY, adapter, loss_lines, losses
from .moments import DISK
from .stories import (
    BROKEN_LINE,
    BROKEN_STREAM,
    ELSEWHERE,
    EXECUTED,
    FREED,
    FULL,
    KILLS,
    OTHER_RUN,
    REFUSED,
    STREAM,
)

KILLED = -signal.SIGKILL


class Told:
    """What came of the stories, and the directory they were played in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        worker = ["-m", "tests.faults.fault_worker", "results.json"]
        finished = run(worker, directory, **ON_CPU)
        assert finished.exit_code == 0, finished.stderr
        self.of: dict[str, Any] = json.loads((directory / "results.json").read_text())

    def run(self, story: str) -> Path:
        return self.directory / story.replace(" ", "_") / RUN_NAME


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("faults"))


def exit_codes(life: dict[str, Any]) -> list[int]:
    return [rank["exit_code"] for rank in life["ranks"]]


@pytest.mark.parametrize("topology", KILLS)
def test_a_killed_rank_stops_the_other_and_the_run_goes_on(told: Told, topology: str) -> None:
    *killed, last = told.of[f"{topology} killed"]
    for (victim, place, _), life in zip(KILLS[topology], killed, strict=True):
        codes = exit_codes(life)
        assert codes[victim] == KILLED, f"{place}: {life}"
        # When all is done, the other one may be faster.
        assert codes[1 - victim] in ((0, 3) if place == "group ended" else (3,)), f"{place}: {life}"
    assert exit_codes(last) == [0, 0], last


@pytest.mark.parametrize("topology", KILLS)
def test_no_step_is_done_again_that_a_checkpoint_has(told: Told, topology: str) -> None:
    lives = told.of[f"{topology} killed"]
    assert [life["repeats"] for life in lives] == [False] * len(lives)
    for before, life in pairwise(lives):
        text = "".join(rank["stderr"] for rank in life["ranks"])
        # A kill damages none, whatever was being written.
        assert "in its place" not in text
        if before["newest"] > 0:
            assert "begins anew" not in text


@pytest.mark.parametrize("topology", KILLS)
def test_the_end_is_that_of_a_run_which_nothing_happened_to(told: Told, topology: str) -> None:
    whole, killed = told.run(topology), told.run(f"{topology} killed")
    assert losses(killed) == losses(whole)
    assert adapter(killed) == adapter(whole)


def test_kills_were_inside_of_saves(told: Told) -> None:
    inside = [
        life["inside save"]
        for topology, kills in KILLS.items()
        for (_, place, _), life in zip(kills, told.of[f"{topology} killed"], strict=False)
        if place == f"{DISK}checkpoints"
    ]
    assert inside == [True] * 4


@pytest.mark.parametrize("topology", KILLS)
def test_nothing_half_written_is_left(told: Told, topology: str) -> None:
    killed = told.run(f"{topology} killed")
    assert [path for path in killed.rglob(".*") if path.name != ".lock"] == []
    checkpoints = sorted(path for path in (killed / "checkpoints").iterdir() if path.is_dir())
    assert checkpoints
    for checkpoint in checkpoints:
        assert {path.name for path in checkpoint.iterdir()} == {*FILES, "manifest.json"}
        read_checkpoint(checkpoint)
    assert (killed / "checkpoints" / LATEST_FILE).read_text().strip() == checkpoints[-1].name


def without_disk(told: Told, story: str) -> None:
    if told.of[story] is None:
        pytest.skip("no file system can be mounted here")


@pytest.mark.parametrize("story", [FULL, FREED])
def test_a_save_on_a_full_disk_is_a_warning_and_the_checkpoint_before_stays(told: Told, story: str) -> None:
    without_disk(told, story)
    stderr = told.of[story]["lives"][0][0]["stderr"]
    assert (
        "warning: checkpoint of step 6: ../disk/run/checkpoints: cannot be written: no space left on the "
        "device; free some or choose another run.output_dir; training goes on, the last good one is "
        "../disk/run/checkpoints/step-00000003\n"
    ) in stderr
    assert "Traceback" not in stderr


def test_a_disk_that_is_freed_in_time_costs_one_checkpoint(told: Told) -> None:
    without_disk(told, FREED)
    [[rank]] = told.of[FREED]["lives"]
    assert rank["exit_code"] == 0, rank["stderr"]
    assert told.of[FREED]["content"] == [LATEST_FILE, "step-00000009", "step-00000012"]
    assert losses(told.run(FREED)) == losses(told.run(ALONE))
    assert adapter(told.run(FREED)) == adapter(told.run(ALONE))


def test_a_disk_that_stays_full_ends_the_run_with_3_and_it_goes_on_once_it_is_freed(told: Told) -> None:
    without_disk(told, FULL)
    [full], [freed] = told.of[FULL]["lives"]
    assert full["exit_code"] == 3, full["stderr"]
    # Not even the lines of metrics.jsonl find a place: said once.
    assert full["stderr"].count("metrics.jsonl: cannot be written: no space left") <= 1
    assert full["stderr"].splitlines()[-1] == (
        "error: ../disk/run: cannot be written: no space left on the device; free some or choose another "
        "run.output_dir, and go on with --resume; the last good checkpoint is "
        "../disk/run/checkpoints/step-00000003"
    )
    assert told.of[FULL]["newest"] == SAVE_EVERY
    assert told.of[FULL]["content"] == [LATEST_FILE, "step-00000003"]
    assert freed["exit_code"] == 0, freed["stderr"]
    assert losses(told.run(FULL)) == losses(told.run(ALONE))
    assert adapter(told.run(FULL)) == adapter(told.run(ALONE))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("in use", "../disk/run: another run is using it (process "),
        ("read-only", "../disk/run: cannot be written: the file system is read-only; choose another "),
        ("pickle", "../disk/run/checkpoints: no checkpoint can be used; restore one, or begin under "),
        (
            "fewer steps",
            "training.max_steps: 3 given or derived; 6 are done in ../disk/run/checkpoints/",
        ),
        ("forbidden change", "adapter.rank: 2 given, 4 in the checkpoint; may not change in a run that is "),
    ],
)
def test_what_cannot_go_on_is_refused_with_2_and_one_message(told: Told, what: str, message: str) -> None:
    if what not in told.of[REFUSED]:
        pytest.skip("no file system can be mounted here")
    [rank] = told.of[REFUSED][what]
    assert rank["exit_code"] == 2, rank["stderr"]
    assert message in rank["stderr"]
    assert rank["stderr"].startswith("error: ")
    assert rank["stderr"].count("error: ") == 1
    assert "Traceback" not in rank["stderr"]


def test_a_pickle_in_a_checkpoint_is_named_and_not_run(told: Told) -> None:
    [rank] = told.of[REFUSED]["pickle"]
    assert "step-00000006/optimizer.pt: looks like a pickle" in rank["stderr"]
    assert not (told.run(REFUSED).parent / EXECUTED).exists()


def test_a_complete_run_says_so_and_does_nothing(told: Told) -> None:
    [begun], [rank] = told.of[REFUSED]["begun"], told.of[REFUSED]["complete"]
    assert (begun["exit_code"], rank["exit_code"]) == (0, 0)
    assert rank["stdout"] == (
        "../disk/run: complete, all 6 steps are done; raise training.max_steps to train on\n"
    )
    assert rank["stderr"] == ""


def test_a_run_continued_elsewhere_goes_on_by_itself_from_the_start(told: Told) -> None:
    """Killed before its first own save, it neither begins anew nor asks for the other run again."""
    killed, continued = (told.of[ELSEWHERE][life][0] for life in ("killed", "continued"))
    assert killed["exit_code"] == KILLED
    assert continued["exit_code"] == 0, continued["stderr"]
    assert "begins anew" not in continued["stderr"]
    other = told.run(ELSEWHERE).with_name(OTHER_RUN)
    assert losses(other) == losses(told.run(ALONE))[6:]
    assert adapter(other) == adapter(told.run(ALONE))


def test_a_broken_line_in_a_stream_costs_nothing(told: Told) -> None:
    """The steps before it are saved, and the run goes on once the line is mended."""
    broken, mended = told.of[BROKEN_STREAM]
    stderr = broken[0]["stderr"]
    # The other rank waits for the launcher, that rank 0 may say it all.
    assert broken[0]["exit_code"] == 2, stderr
    assert f"rows.jsonl:{BROKEN_LINE}: is not valid JSON" in stderr
    assert (
        "the last good checkpoint is ../run/checkpoints/step-00000006; once that is mended, go on with "
        "--resume auto\n"
    ) in stderr
    assert "Traceback" not in "".join(rank["stderr"] for rank in broken)
    assert [rank["exit_code"] for rank in mended] == [0, 0], mended
    assert losses(told.run(BROKEN_STREAM)) == losses(told.run(STREAM))
    assert adapter(told.run(BROKEN_STREAM)) == adapter(told.run(STREAM))


def test_every_run_has_each_step_once(told: Told) -> None:
    for story in (ALONE, *KILLS, *(f"{topology} killed" for topology in KILLS)):
        steps = [step for step, _ in losses(told.run(story))]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) == len(loss_lines(told.run(story))) >= 8
