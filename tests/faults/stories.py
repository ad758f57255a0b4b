"""What happens to the runs of `fault_worker.py`, life by life."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssmlora_dist.tracking import RunDirectory
from ssmlora_dist.tracking.run_directory import LOCK_FILE

from .harness import ALONE, RUN_NAME, TOPOLOGIES, Life, Moment, Story, is_inside_save, loss_lines, newest_step
from .moments import hang, kill

# Where a rank is killed, each life at another place: rank, place, at which call.
KILLS: dict[str, tuple[tuple[int, str, int], ...]] = {
    # In the first save, in the second one, and later in the deletion of an old checkpoint.
    "ZeRO 0": ((0, "disk/checkpoints", 12), (0, "disk/checkpoints", 40), (0, "disk/checkpoints", 68)),
    # In the middle of a step, twice: the second time before it has come as far as the first time.
    "ZeRO 1": ((1, "check", 13), (0, "check", 6)),
    "ZeRO 2": ((0, "evaluation", 2), (1, "evaluation", 3)),
    "ZeRO 3": ((1, "part loaded", 3), (0, "disk/checkpoints", 55)),
    # The last two when all is trained: while the adapter is written, and after the other rank's work.
    "two stages": ((1, "step", 6), (0, "disk/adapter", 5), (1, "group ended", 1)),
}
# ZeRO 3 takes the longest.
OVERRIDES = {"ZeRO 3": ("training.max_steps=8",)}
MIB = 2**20
DISK_MIB = 3
STREAM, BROKEN_STREAM = "a stream", "a stream with a broken line"
FULL, FREED = "a disk that stays full", "a disk that is full for a while"
REFUSED, ELSEWHERE = "refused", "continued elsewhere"
OTHER_RUN = "other"
WITHOUT_EVALUATION = ("evaluation.every_steps=null", "data.validation=null")
EXECUTED = "executed"
STREAMED = "two stages"
# In the fourth block.
BROKEN_LINE, BLOCK = 30, 8


def stories(directory: Path) -> dict[str, Story]:
    """All of them, to be played in `directory`."""

    def run(name: str) -> Path:
        return directory / name.replace(" ", "_")

    return {
        **{f"{topology} killed": killed(topology, run(f"{topology} killed")) for topology in KILLS},
        **{topology: uninterrupted(topology) for topology in TOPOLOGIES},
        FULL: full_disk(run(FULL), for_ever=True),
        FREED: full_disk(run(FREED), for_ever=False),
        REFUSED: refused(run(REFUSED)),
        ELSEWHERE: continued_elsewhere(),
        STREAM: streamed(run(STREAM)),
        BROKEN_STREAM: broken_stream(run(BROKEN_STREAM)),
    }


def uninterrupted(topology: str) -> Story:
    return [(yield Life(topology, OVERRIDES.get(topology, ())))]


def killed(topology: str, directory: Path) -> Story:
    """Killed again and again, then left to go on to the end; how each life ended and what stood then."""
    run, overrides, lives = directory / RUN_NAME, OVERRIDES.get(topology, ()), []
    kills: list[dict[int, list[Moment]]] = [{rank: [(place, n, kill)]} for rank, place, n in KILLS[topology]]
    for moments in (*kills, {}):
        done = loss_lines(run)[: newest_step(run)]
        ranks = yield Life(topology, overrides, moments=moments)
        lives.append(
            {
                "ranks": ranks,
                "inside save": is_inside_save(run),
                "newest": newest_step(run),
                "repeats": loss_lines(run)[: len(done)] != done,
            }
        )
    return lives


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system of `DISK_MIB` at a directory, where one can be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)]
    mounted = False
    with contextlib.suppress(FileNotFoundError):
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def fill(file: Path) -> None:
    """Leaves no byte of the disk that holds `file`."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


def full_disk(directory: Path, for_ever: bool) -> Story:
    """The disk fills up in the middle of the second save; it is freed before the third, or after the run.

    Returns the lives, and None where no disk can be had.
    """
    disk = directory / "disk"
    filler = disk / "filler"
    with small_disk(disk) as mounted:
        if not mounted:
            return None
        overrides = ("run.output_dir=../disk", *WITHOUT_EVALUATION)
        events: list[Moment] = [("disk/checkpoints", 45, partial(fill, filler))]
        if not for_ever:
            events.append(("step", 8, filler.unlink))
        lives = [(yield Life(ALONE, overrides, moments={0: events}))]
        run = disk / RUN_NAME
        seen = {"newest": newest_step(run), "content": sorted(os.listdir(run / "checkpoints"))}
        if for_ever:
            filler.unlink()
            lives.append((yield Life(ALONE, overrides)))
        subprocess.run(["cp", "-r", str(run), str(directory / RUN_NAME)], check=True)
        return {"lives": lives, **seen}


def stream_file(directory: Path, broken: bool) -> tuple[str, ...]:
    """Writes the records of a stream; the overrides that name it."""
    lines = [f'{{"instruction": "Say {i}.", "output": "{i * i}"}}' for i in range(1, 61)]
    if broken:
        lines[BROKEN_LINE - 1] = "{"
    file = directory / "rows.jsonl"
    file.write_text("\n".join(lines))
    source = f'{{"format":"instruction","path":"{file}","streaming":true,"shuffle_buffer_size":{BLOCK}}}'
    return (f"data.train={source}", "checkpoint.every_steps=4", *WITHOUT_EVALUATION)


def streamed(directory: Path) -> Story:
    return [(yield Life(STREAMED, stream_file(directory, broken=False)))]


def broken_stream(directory: Path) -> Story:
    """A line of what is streamed is broken; once it is mended the run goes on."""
    lives = [(yield Life(STREAMED, stream_file(directory, broken=True)))]
    return [*lives, (yield Life(STREAMED, stream_file(directory, broken=False)))]


def continued_elsewhere() -> Story:
    """Killed, continued as another run that is killed before its first save, and that one continued."""
    other = (f"run.name={OTHER_RUN}",)
    yield Life(ALONE, moments={0: [("step", 8, kill)]})
    killed = yield Life(ALONE, other, resume=f"../{RUN_NAME}", moments={0: [("step", 2, kill)]})
    return {"killed": killed, "continued": (yield Life(ALONE, other))}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, EXECUTED))


def hold(run: Path) -> int:
    """Has a process claim a run's directory, as one that works on it; the process.

    Not this one, as every rank that is forked would hold it too.
    """
    lock = run / LOCK_FILE
    lock.write_text("")
    pid = os.fork()
    if pid == 0:
        # Given up where nothing refers to it.
        _directory = RunDirectory.create(run, resume=True)
        hang()
    while not lock.read_text():
        time.sleep(0.01)
    return pid


def refused(directory: Path) -> Story:
    """A run that is complete; then it is to go on in ways in which it cannot."""
    told = {}
    disk = directory / "disk"
    with small_disk(disk) as mounted:
        place = ("run.output_dir=../disk", *WITHOUT_EVALUATION)
        told["begun"] = yield Life(ALONE, (*place, "training.max_steps=6"))
        told["complete"] = yield Life(ALONE, (*place, "training.max_steps=6"))
        told["fewer steps"] = yield Life(ALONE, (*place, "training.max_steps=3"))
        told["forbidden change"] = yield Life(ALONE, (*place, "adapter.rank=2", "run.seed=5"))
        run = disk / RUN_NAME
        holder = hold(run)
        told["in use"] = yield Life(ALONE, place)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            told["read-only"] = yield Life(ALONE, place)
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        for checkpoint in (run / "checkpoints").glob("step-*"):
            torch.save(Bomb(directory / EXECUTED), checkpoint / "optimizer.pt")
        told["pickle"] = yield Life(ALONE, place)
    return told
