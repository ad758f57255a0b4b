"""Ranks that watch each other: when one dies, the others stop at once, with a message that names it.

Collectives cannot be relied on for that: of a dead peer those of gloo tell only the ranks that talk to it,
and those of NCCL wait for their timeout and then abort the process. So every rank holds one connection to
rank 0 open for as long as the run lasts. The kernel closes it with the process, however that ends, and a word
every few seconds tells a rank that works from one that is stopped or out of reach. What rank 0 finds, it
tells the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from ssmlora_dist.errors import EXIT_TRAINING_FAILED, SSMLoRAError
from ssmlora_dist.signals import StopRequested

MEET_SECONDS = 30.0
LONGEST_BEAT_SECONDS = 5.0
MIN_BEATS_UNTIL_SILENT = 5
# From a death to its being known to all ranks takes milliseconds; the rest is for a busy machine.
NOTICE_SECONDS = 1.0
# An unexpected error here so shortly after another rank has left is its consequence; a later one is our own.
CONSEQUENCE_SECONDS = 0.5
# Launchers look every second, and take the rank that they find ended for the cause: it must be the lost one.
LAUNCHER_SECONDS = 2.0
# For the tracker. The launchers kill 30 seconds after the signal that they send when a rank has died.
LAST_ACTS_SECONDS = 15.0
MAX_REASON_LENGTH = 1000
MAX_WORD_LENGTH = 65536


@dataclass
class Peer:
    """Another rank, at the other end of a connection.

    Attributes:
        rank: its rank.
        host: name of its machine.
        process: its id there.
        connection: to it.
        received: the beginning of a word, of which the rest is still to come.
        silent_beats: how often it should have been heard of since it was last.
        ended: whether it has said that it ends.
    """

    rank: int
    host: str
    process: int
    connection: socket.socket
    received: bytes = b""
    silent_beats: int = 0
    ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.process})"


def meet(rank: int, world_size: int, address: str, share: Callable[[Any], Any]) -> list[Peer]:
    """Connects every rank with rank 0; all ranks call it.

    Args:
        rank: of this process.
        world_size: number of processes.
        address: where the others reach rank 0.
        share: gives on every rank what it was given on rank 0.

    Returns:
        On rank 0 all other ranks, on these rank 0.

    Raises:
        OSError: not all connections could be made in time.
    """
    if rank == 0:
        return _receive_all(world_size, share)
    port, token = share(None)
    connection = socket.create_connection((address, port), MEET_SECONDS)
    _send(connection, {"token": token, **_introduction(rank)})
    return [_peer(connection, _read(connection))]


def _receive_all(world_size: int, share: Callable[[Any], Any]) -> list[Peer]:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    peers: list[Peer] = []
    with socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=dual) as server:
        token = secrets.token_hex()
        share((server.getsockname()[1], token))
        deadline = time.monotonic() + MEET_SECONDS
        while len(peers) < world_size - 1:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            connection, _ = server.accept()
            connection.settimeout(NOTICE_SECONDS)
            try:
                introduction = _read(connection)
                if introduction["token"] != token:
                    raise ValueError("the token of another run")
                peers.append(_peer(connection, introduction))
            except (OSError, ValueError, LookupError, TypeError):
                # Somebody else, who has come to the wrong port.
                connection.close()
    for peer in peers:
        _send(peer.connection, _introduction(0))
    return peers


def _introduction(rank: int) -> dict[str, Any]:
    return {"rank": rank, "host": socket.gethostname(), "process": os.getpid()}


def _peer(connection: socket.socket, introduction: dict[str, Any]) -> Peer:
    # A last word must be on its way when the process that sends it ends.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Peer(introduction["rank"], introduction["host"], introduction["process"], connection)


def _send(connection: socket.socket, word: dict[str, Any]) -> None:
    connection.sendall(json.dumps(word).encode() + b"\n")


def _read(connection: socket.socket) -> dict[str, Any]:
    """The next word of a connection, and nothing of what follows."""
    received = b""
    while not received.endswith(b"\n"):
        letter = connection.recv(1)
        if not letter or len(received) > MAX_WORD_LENGTH:
            raise ConnectionError("ended before a whole word had come")
        received += letter
    word: dict[str, Any] = json.loads(received)
    return word


class PeerWatch:
    """Watches the other ranks on a thread of its own, which ends this process when one of them is lost.

    It does so whatever the main thread is doing, which may wait for the lost rank for ever: it shows what has
    happened (on one rank), gives `before_exit` some time, and exits with `EXIT_TRAINING_FAILED`.

    SIGTERM, unless it has a handler, from now on ends this process only after the watch has had the time to
    notice that another rank is lost, which is what launchers send it for.

    Args:
        rank: of this process, on whose main thread this is made.
        peers: what `meet` gave.
        silence_seconds: after which a rank that gives no sign is lost.
        speaks: whether this rank shows the message when it is rank 0 that is lost.

    Attributes:
        before_exit: called before the process ends because another rank is lost.
        last_checkpoint: that rank 0 has noted.
    """

    def __init__(self, rank: int, peers: list[Peer], silence_seconds: float, speaks: bool) -> None:
        self.before_exit: Callable[[], object] | None = None
        self._rank, self._peers, self._speaks = rank, peers, speaks
        self._silence_seconds = silence_seconds
        self._beat_seconds = min(LONGEST_BEAT_SECONDS, silence_seconds / MIN_BEATS_UNTIL_SILENT)
        self._beats_until_silent = math.ceil(silence_seconds / self._beat_seconds)
        self._ending = self._closing = self._asking = self._leaving = False
        self._last_word: str | None = None
        self.last_checkpoint: str | None = None
        # The first rank that left with an error, why, and until when this one may still meet the same error.
        self._left: tuple[Peer, str, float] | None = None
        self._asked_until = 0.0
        self._selector = selectors.DefaultSelector()
        for peer in peers:
            peer.connection.setblocking(False)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._waking, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="peer watch", daemon=True)
        self._thread.start()
        # A child that outlives this process would hold its connections open.
        os.register_at_fork(after_in_child=self._forget)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)

    def note_checkpoint(self, path: str) -> None:
        """Tells all ranks, from rank 0, which checkpoint the message is to name; from any thread."""
        self.last_checkpoint = path
        self._wake()

    def about_to_leave(self, error: BaseException | None) -> None:
        """Says that this rank ends by itself, for which it may need longer than those that left before it."""
        self._leaving = not _is_unexpected(error)

    def leave(self, error: BaseException | None) -> None:
        """Ends the watch and tells the other ranks whether this one is done or ends with an error.

        To be called before the connections of collectives are closed. An unexpected error may be what a
        collective made of a lost rank: then this does not return, and the process ends as described above.
        """
        if _is_unexpected(error):
            self._asking = True
            self._wake()
            if self._ends_soon():
                while True:
                    time.sleep(NOTICE_SECONDS)
        self._close(None if error is None else _reason(error))

    def _close(self, last_word: str | None) -> None:
        self._last_word, self._closing = last_word, True
        self._wake()
        self._thread.join()
        self._forget()

    def _wake(self) -> None:
        self._waking.send(b".")

    def _forget(self) -> None:
        """Lets go of connections and signal, here or in a forked child."""
        for peer in self._peers:
            peer.connection.close()
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        # Where a rank has left in order, nothing else is to be noticed.
        if self._ending or (self._left is None and self._ends_soon()):
            return
        self._close("it was ended by SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)

    def _ends_soon(self) -> bool:
        # No lock and no event: a signal handler interrupts its own thread anywhere.
        deadline = time.monotonic() + NOTICE_SECONDS
        while not self._ending and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._ending

    def _run(self) -> None:
        next_beat = time.monotonic()
        while not self._closing:
            for key, _ in self._selector.select(max(0.0, next_beat - time.monotonic())):
                if key.data is None:
                    self._woken.recv(MAX_WORD_LENGTH)
                    self._tell({"checkpoint": self.last_checkpoint})
                else:
                    self._receive(key.data)
            if self._asking:
                self._asking = False
                self._ask()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._beat_seconds
                self._beat()
            self._judge()
        self._tell({"end": self._last_word})

    def _receive(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(MAX_WORD_LENGTH)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.silent_beats = 0
        *words, peer.received = (peer.received + data).split(b"\n")
        for word in words:
            self._hear(peer, json.loads(word))
        if not data:
            self._selector.unregister(peer.connection)
            if not peer.ended:
                self._end(
                    f"{peer} died without a word: look at its output, the kernel's log there (dmesg: out of "
                    "memory?) and the cluster's"
                )

    def _hear(self, peer: Peer, word: dict[str, Any]) -> None:
        if "stop" in word:
            self._end(None)
        elif "ask" in word:
            self._ask()
        elif "end" in word:
            peer.ended = True
            if word["end"] is not None and self._left is None:
                self._left = (peer, word["end"], time.monotonic() + self._silence_seconds)
        elif peer.rank == 0:
            self.last_checkpoint = word["checkpoint"]

    def _ask(self) -> None:
        """A collective may have failed, here or on the rank that asks: one that has left may be the cause."""
        self._asked_until = time.monotonic() + CONSEQUENCE_SECONDS
        if self._rank != 0:
            self._tell({"ask": True})

    def _beat(self) -> None:
        self._tell({"checkpoint": self.last_checkpoint})
        for peer in self._peers:
            # Not seconds: this process may have been stopped itself.
            peer.silent_beats += 1
            if peer.silent_beats > self._beats_until_silent and not peer.ended:
                self._end(
                    f"{peer} has given no sign for {self._silence_seconds:.0f} seconds: it is stopped, or "
                    "its machine or the network is down"
                )

    def _judge(self) -> None:
        if self._left is None:
            return
        peer, reason, deadline = self._left
        now = time.monotonic()
        if (now >= deadline and not self._leaving) or now < self._asked_until:
            self._end(f"{peer} ended before the others: {reason}")

    def _tell(self, word: dict[str, Any]) -> None:
        line = json.dumps(word).encode() + b"\n"
        for peer in self._peers:
            # That a peer is gone or does not read is noticed where its own words are awaited.
            with contextlib.suppress(OSError):
                peer.connection.send(line)

    def _end(self, problem: str | None) -> NoReturn:
        """Ends this process; without a message where rank 0 names the lost rank."""
        try:
            self._ending = True
            _hold_signals()
            self._tell({"stop": True} if self._rank == 0 else {"end": problem})
            # On another thread, for whatever it waits for is not waited for long.
            last_acts = threading.Thread(target=self._act, args=(problem,), daemon=True)
            last_acts.start()
            time.sleep(LAUNCHER_SECONDS)
            last_acts.join(LAST_ACTS_SECONDS)
        finally:
            os._exit(EXIT_TRAINING_FAILED)

    def _act(self, problem: str | None) -> None:
        if problem is not None and self._speaks:
            print(self._message(problem), file=sys.stderr, flush=True)
        sys.stdout.flush()
        if self.before_exit is not None:
            self.before_exit()

    def _message(self, problem: str) -> str:
        # Not behind a progress bar that is being drawn.
        start = "\n" if sys.stderr.isatty() else ""
        on_rank = f" on rank {self._rank}" if self._rank else ""
        checkpoint = "no checkpoint had been written"
        if self.last_checkpoint is not None:
            checkpoint = f"the last good checkpoint is {self.last_checkpoint}"
        return f"{start}error{on_rank}: {problem}. The run has stopped; {checkpoint}"


def _is_unexpected(error: BaseException | None) -> bool:
    return isinstance(error, Exception) and not isinstance(error, SSMLoRAError)


def _reason(error: BaseException) -> str:
    if isinstance(error, SSMLoRAError):
        reason = str(error)
    elif isinstance(error, KeyboardInterrupt):
        reason = "it was interrupted"
    elif isinstance(error, StopRequested):
        reason = f"it was stopped by {signal.Signals(error.signum).name}"
    else:
        reason = f"{type(error).__name__}: {error} (its own output has the traceback)"
    return reason if len(reason) <= MAX_REASON_LENGTH else f"{reason[: MAX_REASON_LENGTH - 3]}..."


def _hold_signals() -> None:
    """Has SIGTERM ignored and a thread that aborts the process wait, as NCCL's when it notices a loss too."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    # Python's own `signal` is for the main thread, and nothing of Python can run on one that aborts.
    libc.signal(signal.SIGTERM, ctypes.c_void_p(signal.SIG_IGN.value))
    libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
