from __future__ import annotations

import io
import math
import time
from pathlib import Path

import pytest

from ssmlora_dist.progress import Progress, Work, counted, progress, shown_by
from ssmlora_dist.tracking import BeforeAfter, Console, console
from ssmlora_dist.tracking.console import ProgressBar, ProgressDisplay, before_after_table, where_to_look


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_before_after_table() -> None:
    rows = [
        BeforeAfter("512", 24, 2.75812, 0.5, 0.25, 1.0),
        BeforeAfter("1024", 1000, 12.5, None, 0.0, None),
        BeforeAfter("all", 1024, math.nan, 0.25, 0.5, 0.46875),
    ]
    assert before_after_table(rows).splitlines() == [
        "length  examples  loss before   after  exact match before   after  change",
        "-------------------------------------------------------------------------",
        "   512        24       2.7581  0.5000               25.0%  100.0%   +75.0",
        "  1024      1000      12.5000       -                0.0%       -       -",
        "   all      1024            -  0.2500               50.0%   46.9%    -3.1",
    ]


def test_where_to_look_in_a_local_store() -> None:
    text = where_to_look(Path("my runs/a"), Path("my runs/a/adapter"), "sqlite:////data/my runs/mlflow.db")
    assert text.splitlines() == [
        "run     my runs/a",
        "adapter my runs/a/adapter",
        "curves  mlflow ui --backend-store-uri 'sqlite:////data/my runs/mlflow.db'",
        "try it  python launch/generate.py --adapter 'my runs/a/adapter' --prompt \"...\"",
    ]


def test_where_to_look_on_a_server_and_without_an_adapter() -> None:
    assert where_to_look(Path("runs/a"), None, "https://tracking.example").splitlines() == [
        "run     runs/a",
        "curves  https://tracking.example",
    ]
    assert where_to_look(Path("runs/a"), None, None) == "run     runs/a"


TRAINING = Work("training", 40, quiet_seconds=0)


def test_a_log_file_gets_a_line_for_every_tenth(clock: Clock) -> None:
    stream = io.StringIO()
    bar = ProgressBar(TRAINING, stream)
    for done in range(1, 41):
        clock.now += 1.0
        bar.update(done, f"loss {1 / done:.4f}", "1,234 tokens/s")
    bar.close(is_done=True)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 4/40 (10%), loss 0.2500, 1,234 tokens/s, 00:36 left"
    assert lines[-1] == "training 40/40 (100%), loss 0.0250, 1,234 tokens/s, 00:00 left"
    assert len(lines) == 10


def test_a_log_file_gets_a_line_every_half_minute_when_steps_are_slow(clock: Clock) -> None:
    stream = io.StringIO()
    bar = ProgressBar(Work("training", 1000, initial=500, quiet_seconds=0), stream)
    for done in range(501, 506):
        clock.now += 15.0
        bar.update(done)
    assert stream.getvalue().splitlines() == [
        "training 502/1000 (50%), 2:04:30 left",
        "training 504/1000 (50%), 2:04:00 left",
    ]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_takes_less_than_five_seconds_is_not_shown(clock: Clock, stream: io.StringIO) -> None:
    bar = ProgressBar(Work("reading rows.jsonl", unit="records"), stream)
    for done in range(1, 50):
        clock.now += 0.1
        bar.update(done)
        bar.tick()
    bar.close(is_done=True)
    assert stream.getvalue() == ""


def test_what_takes_longer_has_lines_now_and_then_in_a_log(clock: Clock) -> None:
    stream = io.StringIO()
    bar = ProgressBar(Work("reading rows.jsonl", unit="records"), stream)
    for done in range(1, 560):
        clock.now += 0.125
        bar.update(1000 * done, f"{900 * done:,} examples")
    bar.close(is_done=True)
    assert stream.getvalue().splitlines() == [
        "reading rows.jsonl, 40,000 records, 36,000 examples, 00:05",
        "reading rows.jsonl, 280,000 records, 252,000 examples, 00:35",
        "reading rows.jsonl, 520,000 records, 468,000 examples, 01:05",
        "reading rows.jsonl: done, 559,000 records, 01:09",
    ]


def test_tenths_that_go_by_quickly_have_no_lines_of_their_own(clock: Clock) -> None:
    stream = io.StringIO()
    bar = ProgressBar(Work("loading the base model", 34), stream)
    for done in range(1, 35):
        clock.now += 0.5
        bar.update(done)
    bar.close(is_done=True)
    assert stream.getvalue().splitlines() == [
        "loading the base model 10/34 (29%), 00:12 left",
        "loading the base model 20/34 (59%), 00:07 left",
        "loading the base model 30/34 (88%), 00:02 left",
        "loading the base model: done, 00:17",
    ]


def test_time_is_shown_to_pass_where_a_unit_takes_minutes(clock: Clock) -> None:
    stream = io.StringIO()
    bar = ProgressBar(Work("evaluation", 2), stream)
    for _ in range(41):
        clock.now += 1.0
        bar.tick()
    bar.close(is_done=False)
    assert stream.getvalue().splitlines() == [
        "evaluation 0/2 (0%), ? left",
        "evaluation 0/2 (0%), ? left",
    ]


def test_a_terminal_gets_a_bar_with_the_same_figures(clock: Clock) -> None:
    stream = Terminal()
    bar = ProgressBar(Work("training", 40, initial=10, quiet_seconds=0), stream)
    clock.now += 7.0
    bar.update(20, "loss 0.5000", "1,234 tokens/s")
    bar.close(is_done=True)
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("training  50%|")
    assert last.endswith("| 20/40, loss 0.5000, 1,234 tokens/s, 00:14 left")


def test_a_terminal_gets_figures_alone_where_the_end_is_not_known(clock: Clock) -> None:
    stream = Terminal()
    bar = ProgressBar(Work("reading rows.jsonl", unit="records"), stream)
    clock.now += 5.0
    bar.tick()
    clock.now += 60.0
    bar.update(1200)
    bar.close(is_done=True)
    drawn = [text.rstrip() for text in stream.getvalue().split("\r")]
    assert "reading rows.jsonl, 00:05" in drawn
    assert drawn[-1] == "reading rows.jsonl, 1,200 records, 01:05"


def test_the_display_shows_work_until_it_ends(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream, tick_seconds=3600) as display, shown_by(display.show):
        for number in counted(range(3), "counting", 3):
            clock.now += 4.0 * number
        with progress("waiting"):
            pass
        clock.now += 100.0
    assert stream.getvalue().splitlines() == ["counting 3/3 (100%), 00:00 left"]


def test_what_an_error_leaves_open_is_closed_before_its_message(clock: Clock) -> None:
    stream = Terminal()
    with ProgressDisplay(stream, tick_seconds=3600) as display, shown_by(display.show):
        items = counted(range(3), "counting", 3)
        next(items)
        clock.now += 5.0
        next(items)
    assert stream.getvalue().endswith("left\n")
    items.close()
    assert stream.getvalue().endswith("left\n")


def test_a_thread_looks_after_work_that_says_nothing(clock: Clock) -> None:
    stream = io.StringIO()
    with ProgressDisplay(stream, tick_seconds=0.001) as display, shown_by(display.show), progress("waiting"):
        clock.now += 5.0
        deadline = 5000
        while not stream.getvalue() and deadline:
            time.sleep(0.001)
            deadline -= 1
    assert stream.getvalue().splitlines()[0] == "waiting, 00:05"


def test_a_display_of_other_ranks_shows_nothing() -> None:
    with ProgressDisplay(None) as display:
        assert type(display.show(TRAINING)) is Progress


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Console(enabled=False)
    silent.message("a")
    silent.warn("b")
    silent.print_before_after([])
    silent.print_where_to_look(Path("a"), None, None)
    assert capsys.readouterr() == ("", "")


def test_results_go_to_the_output_and_warnings_to_the_error_stream(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console().message("result")
    Console().warn("careful")
    assert capsys.readouterr() == ("result\n", "warning: careful\n")
