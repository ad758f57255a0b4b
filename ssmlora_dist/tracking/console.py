"""What a person sees of a run: progress, the table of before and after, where everything lies."""

from __future__ import annotations

import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ssmlora_dist.progress import Progress, Work

LINE_EVERY_SECONDS = 30.0
REDRAW_SECONDS = 0.1
TICK_SECONDS = 1.0


@dataclass(frozen=True)
class BeforeAfter:
    """One evaluation before and after training.

    Attributes:
        length: what the examples have in common: an input length in tokens, or `all`.
        num_examples: how many were evaluated.
        loss_before: mean loss per target token; None where it was not measured, as with `loss_after`.
        loss_after: the same after training.
        exact_match_before: share of the examples answered exactly, from 0 to 1, or None.
        exact_match_after: the same after training.
    """

    length: str
    num_examples: int
    loss_before: float | None
    loss_after: float | None
    exact_match_before: float | None
    exact_match_after: float | None


class Console:
    """The terminal of rank 0; on other ranks (`enabled=False`) nothing is shown.

    Results go to the standard output; progress and warnings to the standard error stream.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled

    def message(self, text: str) -> None:
        """Shows text on the standard output, above a progress bar that is being drawn."""
        if self._enabled:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Shows a warning on the standard error stream; may be called from any thread."""
        if self._enabled:
            tqdm.write(f"warning: {text}", file=sys.stderr)

    def print_before_after(self, rows: Sequence[BeforeAfter]) -> None:
        """Shows the table of `before_after_table`."""
        self.message(before_after_table(rows))

    def print_where_to_look(
        self, run_directory: Path, adapter: Path | None, tracking_uri: str | None
    ) -> None:
        """Shows the lines of `where_to_look`."""
        self.message(where_to_look(run_directory, adapter, tracking_uri))


class ProgressDisplay:
    """Shows how far pieces of work are, each by a `ProgressBar`, while it is entered.

    A thread of its own looks after them: time passes too where a unit of work takes minutes.

    Args:
        stream: where to show it; None shows nothing.
        tick_seconds: how often the thread looks.
    """

    def __init__(self, stream: TextIO | None, tick_seconds: float = TICK_SECONDS) -> None:
        self._stream, self._tick_seconds = stream, tick_seconds
        self._bars: list[ProgressBar] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def show(self, work: Work) -> Progress:
        """Begins to show a piece of work."""
        if self._stream is None:
            return Progress()
        bar = ProgressBar(work, self._stream, on_close=self._bars.remove)
        self._bars.append(bar)
        return bar

    def __enter__(self) -> ProgressDisplay:
        if self._stream is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._stream is not None:
            self._thread.join()
        # What an error has left open: its message begins on a line of its own.
        for bar in list(self._bars):
            bar.close(is_done=False)

    def _run(self) -> None:
        while not self._ended.wait(self._tick_seconds):
            for bar in list(self._bars):
                bar.tick()


class ProgressBar(Progress):
    """One piece of work, with the figures of its latest unit and the time left.

    On a terminal it is a bar; elsewhere (a log file) a line at every tenth of the way, though not more often
    than every `work.quiet_seconds`, and every half minute when a tenth takes longer. What is done sooner than
    that is not shown at all.

    Args:
        work: what is shown.
        stream: where.
        on_close: told of this bar at its end.
    """

    def __init__(
        self, work: Work, stream: TextIO, on_close: Callable[[ProgressBar], object] = lambda bar: None
    ) -> None:
        self._work, self._stream, self._on_close = work, stream, on_close
        self._done, self._figures = work.initial, tuple[str, ...]()
        self._began = self._shown_at = time.monotonic()
        # Tenths that are done and, as soon as there is a line, units that it has told of.
        self._tenths, self._told = self._tenths_done(), -1
        self._is_terminal, self._is_closed = stream.isatty(), False
        self._bar: tqdm | None = None
        # Updated where the work is done, and looked after by another thread.
        self._lock = threading.RLock()

    def update(self, done: int, *figures: str) -> None:
        """Shows that `done` units are done, with figures of the latest, where that is due."""
        with self._lock:
            self._done, self._figures = done, figures
            self.tick()

    def tick(self) -> None:
        """Shows how far it is, where that is due; to be called now and then, from any thread."""
        with self._lock:
            now = time.monotonic()
            if self._is_closed or now - self._began < self._work.quiet_seconds:
                return
            if self._is_terminal:
                if self._bar is None or now - self._shown_at >= REDRAW_SECONDS:
                    self._draw(now)
            elif self._line_is_due(now):
                self._write(now)

    def close(self, *, is_done: bool) -> None:
        """Leaves the bar as it stands, or says that what was shown in lines is done."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._on_close(self)
            now = time.monotonic()
            if self._bar is not None:
                self._draw(now)
                self._bar.close()
            elif is_done and self._told not in (-1, self._work.total):
                parts = [f"{self._work.description}: done", *self._counted(), _duration(now - self._began)]
                self._print(parts)

    def _draw(self, now: float) -> None:
        self._shown_at = now
        figures = ", ".join([*self._counted(), *self._figures, self._time(now)])
        if self._bar is not None:
            self._bar.n = self._done
            self._bar.set_postfix_str(figures)
            return
        form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self._bar = tqdm(
            total=self._work.total,
            initial=self._done,
            desc=self._work.description,
            postfix=figures,
            file=self._stream,
            dynamic_ncols=True,
            # Below another one it does not stay.
            leave=None,
            bar_format=form if self._work.total else "{desc}{postfix}",
        )

    def _write(self, now: float) -> None:
        self._shown_at, self._tenths, self._told = now, self._tenths_done(), self._done
        head, total = self._work.description, self._work.total
        if total:
            head = f"{head} {self._done}/{total} ({self._done / total:.0%})"
        self._print([head, *self._counted(), *self._figures, self._time(now)])

    def _print(self, parts: Sequence[str]) -> None:
        print(", ".join(parts), file=self._stream, flush=True)

    def _line_is_due(self, now: float) -> bool:
        waited, quiet = now - self._shown_at, self._work.quiet_seconds
        if quiet and self._told == -1:
            return True
        has_passed_tenth = self._tenths_done() > self._tenths and waited >= quiet
        return has_passed_tenth or waited >= LINE_EVERY_SECONDS

    def _tenths_done(self) -> int:
        # Counted in whole tenths, so that rounding makes no line come early or twice.
        return math.floor(10 * self._done / self._work.total + 1e-9) if self._work.total else 0

    def _counted(self) -> list[str]:
        """Of work whose end is not known."""
        return [f"{self._done:,} {self._work.unit}"] if self._done and not self._work.total else []

    def _time(self, now: float) -> str:
        """The time left, or that passed where the end is not known."""
        seconds, done = now - self._began, self._done - self._work.initial
        if not self._work.total:
            return _duration(seconds)
        left = _duration(seconds / done * (self._work.total - self._done)) if done > 0 else "?"
        return f"{left} left"


def before_after_table(rows: Sequence[BeforeAfter]) -> str:
    """Loss and exact match before and after training, a line for each input length, as aligned text."""
    heading = ("length", "examples", "loss before", "after", "exact match before", "after", "change")
    table = [heading]
    for row in rows:
        table.append(
            (
                row.length,
                str(row.num_examples),
                _number(row.loss_before),
                _number(row.loss_after),
                _percent(row.exact_match_before),
                _percent(row.exact_match_after),
                _points(row.exact_match_before, row.exact_match_after),
            )
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(heading))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def where_to_look(run_directory: Path, adapter: Path | None, tracking_uri: str | None) -> str:
    """Where a run's results are, and the commands to look at them.

    Args:
        run_directory: of the run.
        adapter: the trained adapter's directory; None when there is none.
        tracking_uri: MLflow's store; None when the run was not tracked.
    """
    lines = [("run", str(run_directory))]
    if adapter is not None:
        lines.append(("adapter", str(adapter)))
    if tracking_uri is not None and tracking_uri.startswith(("http://", "https://")):
        lines.append(("curves", tracking_uri))
    elif tracking_uri is not None:
        lines.append(("curves", f"mlflow ui --backend-store-uri {shlex.quote(tracking_uri)}"))
    if adapter is not None:
        command = f'python launch/generate.py --adapter {shlex.quote(str(adapter))} --prompt "..."'
        lines.append(("try it", command))
    return "\n".join(f"{name:<8}{value}" for name, value in lines)


def _duration(seconds: float) -> str:
    return str(tqdm.format_interval(seconds))


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"


def _points(before: float | None, after: float | None) -> str:
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return "-"
    return f"{100 * (after - before):+.1f}"
