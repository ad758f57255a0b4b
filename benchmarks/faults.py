"""A hundred kills, and what becomes of the runs: `python benchmarks/faults.py --kills 100`.

Tiny runs over two ranks with ZeRO 0, 1, 2 and 3, and as two pipeline stages, over gloo on the CPU. One rank
is killed by SIGKILL at a random moment of its life, or between two changes of the disk while it saves; then
the run is started again with `--resume auto`, killed again, and so on until it comes to its end. A kill
counts as survived when the run that it hit has ended with the adapter of the uninterrupted run on the same
topology, bit for bit, and with its losses, and has done no step again that a checkpoint had. Exit code 1
unless all are.

Ranks are forked from a process that has imported all they need, so that a life takes seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

# Read when torch is loaded: one thread each, and a rank that waits leaves the cores alone.
os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu"
)
# The harness lies beside the tests that use it too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.tracking.rows import append_row
from tests.faults.harness import (
    TOPOLOGIES,
    Found,
    Life,
    Story,
    adapter,
    is_inside_save,
    loss_lines,
    losses,
    newest_step,
    play,
)
from tests.faults.moments import DISK, kill
from tests.launch.preloaded import hide_plots, preload

RESULTS = Path(__file__).parent / "results" / "faults.jsonl"
TWO_RANKS = tuple(name for name, (num_ranks, _) in TOPOLOGIES.items() if num_ranks == 2)
NUM_AT_ONCE = 2
NUM_STEPS = 24
OVERRIDES = (f"training.max_steps={NUM_STEPS}", "evaluation.every_steps=8")
# Of the kills, so many are to strike while rank 0 saves, at one of so many changes of the disk (three saves).
IN_SAVE_FRACTION, LAST_CHANGE = 0.4, 130
# Of one run; one that has not ended by then is lost.
MAX_LIVES = 60


@dataclass
class Tally:
    """What the kills on one topology came to.

    Attributes:
        topology: a name in the harness.
        kills: ranks killed.
        inside_save: of these, while a checkpoint was being written or deleted, as the disk shows.
        resumed: of these, those whose run has come to its end.
        equal: of these, those whose run has ended as the uninterrupted one did.
        runs: how many the kills were spread over.
        others_stopped: how often the other rank has noticed and stopped with exit code 3.
        others_ended: how often it was ended from outside, as the two had not met yet.
        seconds_uninterrupted: of one run without kills.
    """

    topology: str
    kills: int = 0
    inside_save: int = 0
    resumed: int = 0
    equal: int = 0
    runs: int = 0
    others_stopped: int = 0
    others_ended: int = 0
    seconds_uninterrupted: float = 0.0


def survive(tally: Tally, num_kills: int, directory: Path, generator: random.Random) -> Story:
    """One run without kills, then others until so many kills have struck."""
    began = time.monotonic()
    yield Life(tally.topology, (*OVERRIDES, "run.name=whole"))
    tally.seconds_uninterrupted = time.monotonic() - began
    whole = directory / "whole"
    while tally.kills < num_kills:
        tally.runs += 1
        run, before = directory / f"run-{tally.runs}", tally.kills
        problem = yield from _killed_run(tally, num_kills, run, generator)
        struck = tally.kills - before
        if problem is None:
            tally.resumed += struck
            if losses(run) != losses(whole) or adapter(run) != adapter(whole):
                problem = "ended, but not as the uninterrupted run did"
            else:
                tally.equal += struck
        fate = "survived" if problem is None else f"LOST: {run} {problem}"
        if struck or problem:
            count = f"{tally.kills} of {num_kills} kills"
            print(f"{tally.topology}: {count}, the last {struck} {fate}", flush=True)


def _killed_run(
    tally: Tally, num_kills: int, run: Path, generator: random.Random
) -> Generator[Life, Found, str | None]:
    """One run from its beginning to its end; what is wrong with it, if anything."""
    for _ in range(MAX_LIVES):
        victim, life = _life(tally, num_kills, run.name, generator)
        newest = newest_step(run)
        done = loss_lines(run)[:newest]
        found = yield life
        said = "".join(rank["stderr"] for rank in found)
        if loss_lines(run)[: len(done)] != done or (newest and "begins anew" in said):
            return f"did steps again that the checkpoint of step {newest} had"
        if "in its place" in said:
            return "passed over a checkpoint"
        codes = [rank["exit_code"] for rank in found]
        other = codes[1 - victim]
        if codes[victim] != -signal.SIGKILL:
            return None if codes == [0, 0] else f"ended with {codes}: {said}"
        tally.kills += 1
        tally.inside_save += is_inside_save(run)
        tally.others_stopped += other == 3
        tally.others_ended += other == -signal.SIGKILL
        if other not in (0, 3, -signal.SIGKILL):
            return f"left a rank that ended with {other}: {said}"
    return f"did not end in {MAX_LIVES} lives"


def _life(tally: Tally, num_kills: int, name: str, generator: random.Random) -> tuple[int, Life]:
    """The next life of a run, with the rank that is to be killed in it while kills are left."""
    overrides = (*OVERRIDES, f"run.name={name}")
    if tally.kills == num_kills:
        return 0, Life(tally.topology, overrides)
    if generator.random() < IN_SAVE_FRACTION:
        moment = (f"{DISK}checkpoints", generator.randint(1, LAST_CHANGE), kill)
        return 0, Life(tally.topology, overrides, moments={0: [moment]})
    victim = generator.randrange(2)
    seconds = generator.uniform(0, tally.seconds_uninterrupted)
    return victim, Life(tally.topology, overrides, killed=(victim, seconds))


def _show(tallies: list[Tally]) -> None:
    print(f"{'topology':12} kills  inside a save  runs  resumed  equal bit for bit  lost")
    total = Tally("all")
    for tally in tallies:
        for key in ("kills", "inside_save", "runs", "resumed", "equal"):
            setattr(total, key, getattr(total, key) + getattr(tally, key))
    for tally in (*tallies, total):
        print(
            f"{tally.topology:12} {tally.kills:5}  {tally.inside_save:13}  {tally.runs:4}  {tally.resumed:7}"
            f"  {tally.equal:17}  {tally.kills - tally.equal:4}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="rows are added here (default: %(default)s)"
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="for the runs, which stay if any is lost (default: a temporary one)",
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    preload()
    hide_plots()
    if arguments.work_dir is not None:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="faults.", dir=arguments.work_dir))
    tallies = [Tally(topology) for topology in TWO_RANKS]
    stories = {}
    for index, tally in enumerate(tallies):
        share = len(range(index, arguments.kills, len(tallies)))
        own_directory = directory / tally.topology.replace(" ", "_")
        generator = random.Random(f"{arguments.seed} {tally.topology}")
        stories[tally.topology] = survive(tally, share, own_directory, generator)
    play(stories, directory, NUM_AT_ONCE)
    _show(tallies)
    for tally in tallies:
        append_row(
            arguments.out,
            {
                "benchmark": "faults",
                **asdict(tally),
                "lost": tally.kills - tally.equal,
                "seed": arguments.seed,
                "num_steps": NUM_STEPS,
                "in_save_fraction": IN_SAVE_FRACTION,
                "all_seconds": time.monotonic() - began,
            },
        )
    survived = sum(tally.equal for tally in tallies)
    print(f"{survived} of {arguments.kills} kills survived, in {time.monotonic() - began:.0f} seconds")
    if survived < arguments.kills:
        print(f"the runs are in {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
