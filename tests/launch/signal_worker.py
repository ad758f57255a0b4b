"""Runs that get signals, over forked ranks: `python -m tests.launch.signal_worker RESULTS`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..faults.harness import ALONE, RUN_NAME, Life, Moment, Story, newest_step, play
from ..faults.moments import hang
from .preloaded import hide_plots

TERM, INT = signal.SIGTERM, signal.SIGINT
USR1, USR2 = signal.SIGUSR1, signal.SIGUSR2
GRACE_SECONDS = 1
SHORT_GRACE = (f"checkpoint.grace_seconds={GRACE_SECONDS}",)
SHORT = ("training.max_steps=6",)
# Checks: one for each of the two examples evaluated first, and one for each of a step's four micro-batches.
IN_STEP_5, IN_STEP_5_OF_TWO_RANKS = 2 + 4 * 4 + 3, 1 + 4 * 2 + 2
IN_STEP_2 = 2 + 4 + 2
# Of the disk: in the middle of the second save, that after step 5.
IN_SECOND_SAVE = 60


def signal_self(*signums: int) -> None:
    """Sends this process signals, one after another, and lets it hear them."""
    print(time.monotonic(), flush=True)
    for signum in signums:
        os.kill(os.getpid(), signum)
        time.sleep(0.3)


def interrupt_twice_and_hang() -> None:
    signal_self(INT, INT)
    hang()


def lose_the_reader() -> None:
    """Nobody reads any more what this process says: of `2>&1 | tee`, Ctrl-C has ended `tee` already."""
    reading, writing = os.pipe()
    os.close(reading)
    for descriptor in (1, 2):
        os.dup2(writing, descriptor)
    os.close(writing)


def signal_in_computation(signum: int) -> None:
    """A computation of minutes in native code, in which no Python runs on this thread."""
    threading.Timer(0.3, signal_self, [signum]).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


@dataclass(frozen=True)
class Signalled:
    """A run that gets signals in its first life.

    Attributes:
        whole: the name in `WHOLE` of the run that gets none.
        moments: by rank, what happens and when.
        overrides: of the first life alone, beside those of the whole run.
    """

    whole: str
    moments: Mapping[int, Sequence[Moment]]
    overrides: tuple[str, ...] = ()


# Name -> topology, overrides.
WHOLE: dict[str, tuple[str, tuple[str, ...]]] = {
    ALONE: (ALONE, ()),
    "one rank, short": (ALONE, SHORT),
    "ZeRO 1": ("ZeRO 1", ()),
    "ZeRO 3, short": ("ZeRO 3", SHORT),
    "two stages": ("two stages", ()),
}
FORKED = {
    "interrupted": Signalled(ALONE, {0: [("check", IN_STEP_5, partial(signal_self, INT))]}),
    "terminated and told so by its launcher": Signalled(
        ALONE, {0: [("check", IN_STEP_5, partial(signal_self, TERM, TERM))]}
    ),
    "terminated before the first step": Signalled(ALONE, {0: [("check", 1, partial(signal_self, TERM))]}),
    "stopped while loading": Signalled(ALONE, {0: [("part loaded", 1, partial(signal_self, USR2))]}),
    "terminated in the last evaluation": Signalled(
        "one rank, short", {0: [("evaluation", 3, partial(signal_self, TERM))]}
    ),
    "interrupted with nobody reading": Signalled(
        ALONE,
        {
            0: [
                ("check", IN_STEP_2, lose_the_reader),
                ("check", IN_STEP_5, partial(signal_self, INT)),
            ]
        },
    ),
    "told to save": Signalled(
        ALONE,
        {
            0: [
                ("part loaded", 1, partial(signal_self, USR1)),
                ("check", IN_STEP_2, partial(signal_self, USR1)),
            ]
        },
        ("checkpoint.keep=99",),
    ),
    "interrupted twice in a save that hangs": Signalled(
        ALONE, {0: [("disk/checkpoints", IN_SECOND_SAVE, interrupt_twice_and_hang)]}
    ),
    "terminated in a long computation": Signalled(
        ALONE, {0: [("step", 5, partial(signal_in_computation, TERM))]}, SHORT_GRACE
    ),
    "one of two ranks": Signalled(
        "ZeRO 3, short", {1: [("check", IN_STEP_5_OF_TWO_RANKS, partial(signal_self, USR2))]}
    ),
    "one of two stages": Signalled("two stages", {1: [("step", 5, partial(signal_self, INT))]}),
    "both of two ranks": Signalled(
        "ZeRO 1",
        {rank: [("check", IN_STEP_5_OF_TWO_RANKS, partial(signal_self, TERM))] for rank in range(2)},
    ),
}
# Begun before by launchers, in `runs`: the name of the whole run.
LAUNCHED = {"deepspeed terminated": ALONE, "deepspeed interrupted": "ZeRO 1"}


def run_name(name: str) -> str:
    """The name of a run's directory."""
    return name.replace(" ", "_")


def uninterrupted(topology: str, overrides: tuple[str, ...]) -> Story:
    return {"ranks": (yield Life(topology, overrides))}


def signalled(run: Signalled, directory: Path) -> Story:
    """The life that gets the signals, and the one that goes on."""
    topology, overrides = WHOLE[run.whole]
    ranks = yield Life(topology, (*overrides, *run.overrides), moments=run.moments)
    checkpoints = directory / RUN_NAME / "checkpoints"
    told = {
        "ranks": ranks,
        "newest": newest_step(directory / RUN_NAME),
        "checkpoints": sorted(os.listdir(checkpoints)) if checkpoints.exists() else [],
    }
    return {**told, "resumed": (yield Life(topology, overrides))}


def launched(name: str, whole: str, directory: Path) -> Story:
    """The second life of a run that a launcher began."""
    topology, overrides = WHOLE[whole]
    place = (f"run.output_dir={directory / 'runs'}", f"run.name={run_name(name)}")
    return {"resumed": (yield Life(topology, (*overrides, *place)))}


def main() -> None:
    hide_plots()
    directory = Path.cwd()
    stories = {name: signalled(run, directory / run_name(name)) for name, run in FORKED.items()}
    stories |= {name: launched(name, whole, directory) for name, whole in LAUNCHED.items()}
    stories |= {name: uninterrupted(*settings) for name, settings in WHOLE.items()}
    Path(sys.argv[1]).write_text(json.dumps(play(stories, directory, num_at_once=2)))


if __name__ == "__main__":
    main()
