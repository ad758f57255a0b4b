from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import pytest

from ssmlora_dist.tracking import BeforeAfter, Console, ProgressBar, console
from ssmlora_dist.tracking.console import before_after_table, where_to_look


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that tests set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(console.time, "monotonic", lambda: self.now)


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


def test_a_log_file_gets_a_line_for_every_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stream = io.StringIO()
    with ProgressBar(40, "training", stream) as bar:
        for done in range(1, 41):
            clock.now += 1.0
            bar.update(done, loss=1 / done, tokens_per_second=1234.4)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "training 4/40 (10%), loss 0.2500, 1,234 tokens/s, 00:36 left"
    assert lines[-1] == "training 40/40 (100%), loss 0.0250, 1,234 tokens/s, 00:00 left"
    assert len(lines) == 10


def test_a_log_file_gets_a_line_every_minute_when_steps_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    stream = io.StringIO()
    bar = ProgressBar(1000, "training", stream, initial=500)
    for done in range(501, 506):
        clock.now += 30.0
        bar.update(done)
    assert stream.getvalue().splitlines() == [
        "training 502/1000 (50%), 4:09:00 left",
        "training 504/1000 (50%), 4:08:00 left",
    ]


def test_a_terminal_gets_a_bar_with_the_same_figures() -> None:
    stream = Terminal()
    with ProgressBar(40, "training", stream, initial=10) as bar:
        bar.update(20, loss=0.5, tokens_per_second=1234.4)
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("training  50%|")
    assert "| 20/40, loss 0.5000, 1,234 tokens/s, " in last
    assert last.endswith(" left")


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    silent = Console(enabled=False)
    silent.message("a")
    silent.warn("b")
    silent.print_before_after([])
    silent.print_where_to_look(Path("a"), None, None)
    with silent.progress(10, "training") as bar:
        bar.update(10, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_results_go_to_the_output_and_warnings_to_the_error_stream(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Console().message("result")
    Console().warn("careful")
    assert capsys.readouterr() == ("result\n", "warning: careful\n")


def test_the_console_draws_on_the_error_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    Console().progress(2, "evaluation").update(1)
    assert stream.getvalue().startswith("evaluation 1/2 (50%), ")
