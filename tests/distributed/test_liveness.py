"""Ranks that watch each other, as real processes: every way in which one ends, and what the others do."""

from __future__ import annotations

import json
import re
import signal
from typing import Any

import pytest
import torch

from ssmlora_dist.distributed import liveness
from ssmlora_dist.distributed.context import DistributedContext, _start_watch
from ssmlora_dist.distributed.liveness import MAX_REASON_LENGTH, meet

from ..launch.processes import run
from .liveness_worker import CHECKPOINT, ENDED, SHORT_SILENCE

# Within it on a busy machine, and far from every timeout.
PROMPT_SECONDS = 10.0
KILLED = -signal.SIGKILL
NO_CHECKPOINT = "The run has stopped; no checkpoint had been written"

Ended = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All scenarios, played side by side: their ranks wait for most of the time."""
    directory = tmp_path_factory.mktemp("liveness")
    finished = run(
        ["-m", "tests.distributed.liveness_worker", "results.json"],
        directory,
        CUDA_VISIBLE_DEVICES="",
    )
    assert finished.exit_code == 0, finished.stderr
    results: dict[str, Ended] = json.loads((directory / "results.json").read_text())
    return results


def exit_codes(ranks: Ended) -> list[int]:
    return [rank["exit_code"] for rank in ranks]


def messages(ranks: Ended) -> list[str]:
    return [rank["stderr"] for rank in ranks]


def seconds_after_death(ranks: Ended, victim: int) -> list[float]:
    [died_at] = [float(line) for line in ranks[victim]["stdout"].splitlines() if line[0].isdigit()]
    return [rank["ended_at"] - died_at for index, rank in enumerate(ranks) if index != victim]


def test_rank_0_names_a_rank_that_is_killed_and_the_others_are_silent(ended: dict[str, Ended]) -> None:
    ranks = ended["rank 1 is killed"]
    assert exit_codes(ranks) == [3, KILLED, 3]
    assert messages(ranks)[1:] == ["", ""]
    assert re.fullmatch(
        r"error: rank 1 \(host \S+, process \d+\) died without a word: .*dmesg.*\. "
        rf"The run has stopped; the last good checkpoint is {CHECKPOINT}\n",
        ranks[0]["stderr"],
    )
    assert max(seconds_after_death(ranks, 1)) < PROMPT_SECONDS
    assert ENDED in ranks[0]["stdout"]


def test_rank_1_and_one_of_each_machine_name_rank_0(ended: dict[str, Ended]) -> None:
    ranks = ended["rank 0 is killed"]
    assert exit_codes(ranks) == [KILLED, 3, 3, 3]
    assert ranks[2]["stderr"] == ""
    for speaker in (1, 3):
        assert ranks[speaker]["stderr"].startswith(f"error on rank {speaker}: rank 0 (host ")
        assert ranks[speaker]["stderr"].endswith(f"the last good checkpoint is {CHECKPOINT}\n")
    assert max(seconds_after_death(ranks, 0)) < PROMPT_SECONDS


@pytest.mark.parametrize(("victim", "speaker", "start"), [(1, 0, "error: "), (0, 1, "error on rank 1: ")])
def test_a_stopped_rank_is_missed_and_not_called_dead(
    ended: dict[str, Ended], victim: int, speaker: int, start: str
) -> None:
    """Continued afterwards, it stops too."""
    ranks = ended[f"rank {victim} is stopped"]
    assert exit_codes(ranks) == [3, 3, 3]
    assert re.match(
        rf"{start}rank {victim} \(host \S+, process \d+\) has given no sign for 2 seconds: it is stopped",
        ranks[speaker]["stderr"],
    )
    assert "died" not in ranks[speaker]["stderr"]
    assert ranks[2]["stderr"] == ""
    # A beat may have been sent just before.
    assert min(seconds_after_death(ranks, victim)) > SHORT_SILENCE * 0.75
    assert max(seconds_after_death(ranks, victim)) < SHORT_SILENCE + PROMPT_SECONDS


def test_a_rank_that_is_done_is_not_missed(ended: dict[str, Ended]) -> None:
    ranks = ended["one is done"]
    assert exit_codes(ranks) == [0, 0, 0]
    assert messages(ranks) == ["", "", ""]


def test_an_error_that_all_meet_stays_their_own(ended: dict[str, Ended]) -> None:
    assert exit_codes(ended["all meet the same error"]) == [2, 2, 2]
    assert exit_codes(ended["all meet the same bug"]) == [1, 1, 1]
    assert messages(ended["all meet the same error"] + ended["all meet the same bug"]) == [""] * 6


@pytest.mark.parametrize(
    "name", ["one meets an error and the others wait", "one meets an error and a collective fails"]
)
def test_an_error_of_one_rank_ends_the_others(ended: dict[str, Ended], name: str) -> None:
    ranks = ended[name]
    assert exit_codes(ranks) == [3, 3, 2]
    assert re.fullmatch(
        rf"error: rank 2 \(host \S+, process \d+\) ended before the others: rows\.jsonl:3: broken\. "
        rf"{NO_CHECKPOINT}\n",
        ranks[0]["stderr"],
    )
    assert messages(ranks)[1:] == ["", ""]


def test_a_rank_that_ends_by_itself_may_take_longer_than_the_others(ended: dict[str, Ended]) -> None:
    ranks = ended["rank 0 ends slowly"]
    assert exit_codes(ranks) == [2, 2]
    assert ranks[0]["ended_at"] - ranks[1]["ended_at"] > SHORT_SILENCE
    assert messages(ranks) == ["", ""]


@pytest.mark.parametrize("name", ["terminated before the death", "aborted on the way out"])
def test_no_signal_cuts_the_message_or_the_tracker_short(ended: dict[str, Ended], name: str) -> None:
    ranks = ended[name]
    assert exit_codes(ranks) == [3, KILLED]
    assert "rank 1" in ranks[0]["stderr"]
    assert ENDED in ranks[0]["stdout"]


def test_sigterm_ends_a_rank_that_misses_nobody_and_the_other_says_so(ended: dict[str, Ended]) -> None:
    ranks = ended["terminated alone"]
    assert exit_codes(ranks) == [-signal.SIGTERM, 3]
    assert ranks[0]["stderr"] == ""
    assert "rank 0 " in ranks[1]["stderr"]
    assert "ended before the others: it was ended by SIGTERM" in ranks[1]["stderr"]


def test_a_handler_that_is_there_stays(ended: dict[str, Ended]) -> None:
    ranks = ended["handler of the run stays"]
    assert [rank["stdout"] for rank in ranks] == ["True True\n"] * 2


@pytest.mark.parametrize("name", ["tracker hangs", "child outlives its rank"])
def test_the_end_does_not_wait_for(ended: dict[str, Ended], name: str) -> None:
    ranks = ended[name]
    assert exit_codes(ranks) == [3, KILLED]
    assert max(seconds_after_death(ranks, 1)) < PROMPT_SECONDS


def test_reasons_are_short() -> None:
    assert liveness._reason(KeyboardInterrupt()) == "it was interrupted"
    assert liveness._reason(MemoryError("full")) == "MemoryError: full (its own output has the traceback)"
    assert len(liveness._reason(ValueError("x" * 9999))) == MAX_REASON_LENGTH


def test_ranks_that_cannot_reach_rank_0_do_not_watch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them go on as without a watch: one that never came must not be taken for dead."""
    monkeypatch.setattr(liveness, "MEET_SECONDS", 0.1)
    with pytest.raises(OSError, match="timed out"):
        meet(0, 2, "127.0.0.1", lambda value: value)
    monkeypatch.setattr(DistributedContext, "share", lambda context, value: value)
    monkeypatch.setattr(DistributedContext, "max", lambda context, values: values)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    context = DistributedContext(0, 2, 0, torch.device("cpu"))
    assert _start_watch(context, 60.0) is None
    assert capsys.readouterr().err == "warning: rank 0 cannot watch the others: timed out\n"
    # Without a watch all that concerns it does nothing.
    context.when_a_rank_is_lost(lambda: None)
    context.note_checkpoint("checkpoints/step-7")
    context.about_to_stop()
