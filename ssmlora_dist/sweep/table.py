"""What a person sees of a sweep: the plan, what runs and what is left, and what became of every point."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from ssmlora_dist.sweep.directory import Row
from ssmlora_dist.sweep.plan import Plan, SweepState, estimate_seconds

REFRESH_SECONDS = 1.0
SHOWN_CHARACTERS = 80
_HEADING = ("point", "outcome", "final loss", "validation loss", "tokens/s", "peak GiB", "time", "reason")
_SHOWN = ("final_loss", "validation_loss_after", "tokens_per_second", "peak_memory_gib")
_FORMATS = (".4f", ".4f", ",.0f", ".2f")


def plan_text(plan: Plan, state: SweepState, points_at_once: int) -> str:
    """Every point with what it sets and what becomes of it; their number and the estimated time."""
    pending = {planned.name for planned in state.pending}
    lines = [("point", "group", "ranks", "plan", "sets")]
    for planned in plan.points:
        point, row = planned.point, state.rows[planned.name]
        action = "run" if row.outcome in ("not_run", "finished") else f"run ({row.outcome} before)"
        sets = ", ".join(f"{key}={json.dumps(value)}" for key, value in point.overrides.items())
        shown = action if planned.name in pending else f"keep: {row.outcome}"
        lines.append((point.name, point.group, str(point.ranks), shown, _cut(sets) or "-"))
    seconds = estimate_seconds(state.pending, state.rows)
    at_once = max(1, min(points_at_once, len(pending)))
    shown_time = "unknown, no point is finished yet" if seconds is None else _duration(seconds / at_once)
    if not pending:
        shown_time = _duration(0)
    count = (
        f"{len(plan.points)} points, {len(pending)} to run, {at_once} at once; estimated time: {shown_time}"
    )
    return f"{_aligned(lines)}\n{count}"


def outcome_table(rows: Iterable[Row]) -> str:
    """A line for every point, whatever became of it."""
    lines: list[tuple[str, ...]] = [_HEADING]
    for row in rows:
        figures = [
            "-" if name not in row.metrics else format(row.metrics[name], form)
            for name, form in zip(_SHOWN, _FORMATS, strict=True)
        ]
        seconds = "-" if row.wall_seconds is None else _duration(row.wall_seconds)
        lines.append((row.point, row.outcome.replace("_", " "), *figures, seconds, row.reason or ""))
    return _aligned(lines)


def counts(rows: Iterable[Row]) -> str:
    """How many points came to what, such as `4 finished, 1 failed`."""
    found = Counter(row.outcome for row in rows)
    return ", ".join(f"{number} {outcome.replace('_', ' ')}" for outcome, number in found.items())


@dataclass(frozen=True)
class RunningPoint:
    """What is shown of a point that runs: `doing` is how far it is."""

    name: str
    doing: str
    seconds: float


class LiveTable:
    """What runs and what is left.

    On a terminal a block that is drawn anew every second; elsewhere (a log file) nothing but the lines that
    are said.

    Args:
        name: of the sweep.
        stream: where to draw.
    """

    def __init__(self, name: str, stream: TextIO) -> None:
        self._name = name
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._num_lines = 0
        self._drawn_at = -REFRESH_SECONDS
        # Warnings come from other threads.
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Shows a line that stays, above the block."""
        with self._lock:
            self._erase()
            self._write(f"{line}\n")
            self._drawn_at = -REFRESH_SECONDS

    def is_due(self) -> bool:
        """Whether the block is to be drawn again."""
        return self._is_terminal and time.monotonic() - self._drawn_at >= REFRESH_SECONDS

    def draw(
        self,
        rows: Mapping[str, Row],
        running: Sequence[RunningPoint],
        waiting: Sequence[str],
        seconds_left: float | None,
    ) -> None:
        """Draws the block."""
        settled = [
            row for name, row in rows.items() if name not in {*waiting, *(one.name for one in running)}
        ]
        left = "" if seconds_left is None else f", about {_duration(seconds_left)} left"
        done = f"{len(settled)} of {len(rows)} done" + (f" ({counts(settled)})" if settled else "")
        lines = [f"{self._name}: {done}, {len(running)} running, {len(waiting)} waiting{left}"]
        lines += [f"  running  {_duration(one.seconds):>7}  {one.name}  {one.doing}" for one in running]
        if waiting:
            lines.append(f"  next              {', '.join(waiting)}")
        width = shutil.get_terminal_size().columns - 1
        with self._lock:
            self._erase()
            self._write("".join(f"{line[:width]}\n" for line in lines))
            self._num_lines, self._drawn_at = len(lines), time.monotonic()

    def close(self) -> None:
        """Takes the block away."""
        with self._lock:
            self._erase()

    def _erase(self) -> None:
        if self._num_lines:
            # Up to its first line, and everything below is cleared.
            self._write(f"\x1b[{self._num_lines}F\x1b[J")
        self._num_lines = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def ended_line(row: Row, num_left: int) -> str:
    """Said of a point that has ended."""
    seconds = "" if row.wall_seconds is None else f" after {_duration(row.wall_seconds)}"
    reason = f": {row.reason}" if row.reason else ""
    return f"{row.point}: {row.outcome.replace('_', ' ')}{seconds}{reason} ({num_left} left)"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(text.rstrip() for text in [texts[0], "-" * len(texts[0].rstrip()), *texts[1:]])
