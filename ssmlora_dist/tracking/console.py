"""What a person sees of a run: progress, the table of before and after, where everything lies."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

LINE_EVERY_FRACTION = 0.1
LINE_EVERY_SECONDS = 60.0


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

    def progress(self, total: int, description: str, initial: int = 0) -> ProgressBar:
        """A progress bar over `total` steps or examples, of which `initial` are done already."""
        return ProgressBar(total, description, sys.stderr if self._enabled else None, initial)

    def print_before_after(self, rows: Sequence[BeforeAfter]) -> None:
        """Shows the table of `before_after_table`."""
        self.message(before_after_table(rows))

    def print_where_to_look(
        self, run_directory: Path, adapter: Path | None, tracking_uri: str | None
    ) -> None:
        """Shows the lines of `where_to_look`."""
        self.message(where_to_look(run_directory, adapter, tracking_uri))


class ProgressBar:
    """Progress with loss, tokens per second and time left.

    On a terminal it is a bar; elsewhere (a log file) a line at every tenth of the way, and every minute
    when a tenth takes longer.

    Args:
        total: steps or examples in all.
        description: what is going on.
        stream: where to draw; None shows nothing.
        initial: how many are done already.
    """

    def __init__(self, total: int, description: str, stream: TextIO | None, initial: int = 0) -> None:
        self._total = total
        self._description = description
        self._stream = stream
        self._initial = initial
        self._began = self._last_line = time.monotonic()
        self._last_fraction = initial / total if total else 1.0
        self._bar: tqdm | None = None
        if stream is not None and stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                file=stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
            )

    def update(self, done: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Shows that `done` of the total are done, with the figures of the latest step."""
        figures = _figures(loss, tokens_per_second)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(figures), refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._stream is not None and self._line_is_due(done):
            parts = [f"{self._description} {done}/{self._total} ({done / self._total:.0%})", *figures]
            print(", ".join([*parts, f"{self._time_left(done)} left"]), file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line_is_due(self, done: int) -> bool:
        now = time.monotonic()
        # Counted in whole tenths, so that rounding makes no line come early or twice.
        passed = math.floor(done / self._total / LINE_EVERY_FRACTION + 1e-9)
        passed_before = math.floor(self._last_fraction / LINE_EVERY_FRACTION + 1e-9)
        if passed == passed_before and now - self._last_line < LINE_EVERY_SECONDS:
            return False
        self._last_line, self._last_fraction = now, done / self._total
        return True

    def _time_left(self, done: int) -> str:
        if done <= self._initial:
            return "?"
        seconds_each = (time.monotonic() - self._began) / (done - self._initial)
        return str(tqdm.format_interval(seconds_each * (self._total - done)))


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


def _figures(loss: float | None, tokens_per_second: float | None) -> list[str]:
    figures = []
    if loss is not None:
        figures.append(f"loss {loss:.4f}")
    if tokens_per_second is not None:
        figures.append(f"{tokens_per_second:,.0f} tokens/s")
    return figures


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"


def _points(before: float | None, after: float | None) -> str:
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return "-"
    return f"{100 * (after - before):+.1f}"
