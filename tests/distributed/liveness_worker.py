"""Ranks that watch each other, in every way that one of them can end: `liveness_worker.py RESULTS`."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ssmlora_dist.distributed import liveness
from ssmlora_dist.distributed.liveness import PeerWatch, meet
from ssmlora_dist.errors import DataError

from ..launch.forking import run_side_by_side

# The first passes while a busy machine lets a thread wait; the second, before the time limit, does not.
SHORT_SILENCE, NO_SILENCE = 2.0, 1000.0
CHECKPOINT = "checkpoints/step-7"
ENDED = "the tracker has ended"

Behaviour = Callable[[int, PeerWatch], int]


def in_a_collective() -> NoReturn:
    """Waits for a lost rank for ever, as NCCL does."""
    Path(f"{os.getpid()}.waiting").touch()
    while True:
        time.sleep(1)


def wait_for_the_others() -> None:
    """Until they are in a collective, and have heard what they were told before."""
    while len(list(Path().glob("*.waiting"))) < len(list(Path().glob("*.pid"))) - 1:
        time.sleep(0.01)
    time.sleep(0.5)


def die(signum: int = signal.SIGKILL) -> NoReturn:
    wait_for_the_others()
    print(time.monotonic(), flush=True)
    os.kill(os.getpid(), signum)
    in_a_collective()


def end_tracker() -> None:
    time.sleep(0.5)
    print(ENDED, flush=True)


def pid_of(rank: int) -> int:
    return int(wait_for(Path(f"{rank}.pid")))


def leave(watch: PeerWatch, error: Exception, exit_code: int) -> int:
    watch.leave(error)
    return exit_code


def with_victim(victim: int, signum: int, rank: int, watch: PeerWatch) -> int:
    watch.before_exit = end_tracker
    if rank == 0:
        watch.note_checkpoint(CHECKPOINT)
    if rank == victim:
        die(signum)
    in_a_collective()


def one_is_done(rank: int, watch: PeerWatch) -> int:
    if rank != 1:
        time.sleep(1.5 * SHORT_SILENCE)
    watch.leave(None)
    return 0


def all_meet_the_same_error(rank: int, watch: PeerWatch) -> int:
    time.sleep(0.3 * rank)
    return leave(watch, DataError("rows.jsonl:3: broken"), 2)


def one_meets_an_error_and_the_others_wait(rank: int, watch: PeerWatch) -> int:
    if rank == 2:
        return leave(watch, DataError("rows.jsonl:3: broken"), 2)
    in_a_collective()


def one_meets_an_error_and_a_collective_fails(rank: int, watch: PeerWatch) -> int:
    if rank == 2:
        watch.leave(DataError("rows.jsonl:3: broken"))
        Path("left").touch()
        return 2
    if rank == 1:
        wait_for(Path("left"))
        return leave(watch, RuntimeError("Connection closed by peer"), 1)
    in_a_collective()


def all_meet_the_same_bug(rank: int, watch: PeerWatch) -> int:
    return leave(watch, ZeroDivisionError("division by zero"), 1)


def rank_0_ends_slowly(rank: int, watch: PeerWatch) -> int:
    error = DataError("rows.jsonl:3: broken")
    if rank == 0:
        watch.about_to_leave(error)
        time.sleep(1.5 * SHORT_SILENCE)
    return leave(watch, error, 2)


def terminated_before_the_death(rank: int, watch: PeerWatch) -> int:
    """The launcher's signal overtakes the news."""
    watch.before_exit = end_tracker
    if rank == 1:
        wait_for_the_others()
        os.kill(pid_of(0), signal.SIGTERM)
        # Less than the time that the other takes to notice, more than a signal takes.
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    in_a_collective()


def terminated_alone(rank: int, watch: PeerWatch) -> int:
    if rank == 1:
        os.kill(pid_of(0), signal.SIGTERM)
    in_a_collective()


def aborted_on_the_way_out(rank: int, watch: PeerWatch) -> int:
    def abort_elsewhere() -> None:
        threading.Thread(target=ctypes.CDLL(None).abort, daemon=True).start()
        os.kill(os.getpid(), signal.SIGTERM)
        end_tracker()

    watch.before_exit = abort_elsewhere
    # As a run does that is told to stop a second time.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    if rank == 1:
        die()
    in_a_collective()


def tracker_hangs(rank: int, watch: PeerWatch) -> int:
    liveness.LAST_ACTS_SECONDS = 0.5
    watch.before_exit = in_a_collective
    if rank == 1:
        die()
    in_a_collective()


def child_outlives_its_rank(rank: int, watch: PeerWatch) -> int:
    if rank == 1:
        if os.fork() == 0:
            time.sleep(100)
            os._exit(0)
        die()
    in_a_collective()


def handler_of_the_run_stays(rank: int, watch: PeerWatch) -> int:
    handler = signal.getsignal(signal.SIGTERM)
    watch.leave(None)
    print(handler is signal.SIG_IGN, signal.getsignal(signal.SIGTERM) is signal.SIG_IGN)
    return 0


# Name -> (ranks, seconds of silence, what each does).
SCENARIOS: dict[str, tuple[int, float, Behaviour]] = {
    "rank 1 is killed": (3, NO_SILENCE, partial(with_victim, 1, signal.SIGKILL)),
    "rank 0 is killed": (4, NO_SILENCE, partial(with_victim, 0, signal.SIGKILL)),
    "rank 1 is stopped": (3, SHORT_SILENCE, partial(with_victim, 1, signal.SIGSTOP)),
    "rank 0 is stopped": (3, SHORT_SILENCE, partial(with_victim, 0, signal.SIGSTOP)),
    "one is done": (3, SHORT_SILENCE, one_is_done),
    "all meet the same error": (3, SHORT_SILENCE, all_meet_the_same_error),
    "one meets an error and the others wait": (3, SHORT_SILENCE, one_meets_an_error_and_the_others_wait),
    "one meets an error and a collective fails": (3, NO_SILENCE, one_meets_an_error_and_a_collective_fails),
    "all meet the same bug": (3, NO_SILENCE, all_meet_the_same_bug),
    "rank 0 ends slowly": (2, SHORT_SILENCE, rank_0_ends_slowly),
    "terminated before the death": (2, NO_SILENCE, terminated_before_the_death),
    "terminated alone": (2, SHORT_SILENCE, terminated_alone),
    "aborted on the way out": (2, NO_SILENCE, aborted_on_the_way_out),
    "tracker hangs": (2, NO_SILENCE, tracker_hangs),
    "child outlives its rank": (2, NO_SILENCE, child_outlives_its_rank),
    "handler of the run stays": (2, NO_SILENCE, handler_of_the_run_stays),
}


def wait_for(file: Path) -> str:
    """What another rank writes into a file in one go."""
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def share(rank: int, value: Any) -> Any:
    """A broadcast by way of the file system; a stranger is faster than the ranks."""
    file = Path("address")
    if rank == 0:
        with socket.create_connection(("127.0.0.1", value[0])) as stranger:
            stranger.sendall(b'{"token": "guessed", "rank": 1, "host": "elsewhere", "process": 1}\n')
        file.with_suffix(".new").write_text(json.dumps(value))
        file.with_suffix(".new").rename(file)
    return json.loads(wait_for(file))


def rank_of(name: str, rank: int) -> int:
    num_ranks, silence_seconds, behave = SCENARIOS[name]
    if name == "handler of the run stays":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    peers = meet(rank, num_ranks, "127.0.0.1", partial(share, rank))
    # The last of four ranks is the first of another machine.
    watch = PeerWatch(rank, peers, silence_seconds, speaks=rank in (0, 1, 3))
    new = Path(f"{rank}.pid.new")
    new.write_text(str(os.getpid()))
    new.rename(f"{rank}.pid")
    for other in range(num_ranks):
        pid_of(other)
    return behave(rank, watch)


def main() -> None:
    results = Path(sys.argv[1])
    runs = {
        name: [partial(rank_of, name, rank) for rank in range(num_ranks)]
        for name, (num_ranks, _, _) in SCENARIOS.items()
    }
    results.write_text(json.dumps(run_side_by_side(runs, Path.cwd(), len(runs))))


if __name__ == "__main__":
    main()
