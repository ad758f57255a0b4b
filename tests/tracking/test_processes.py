"""Whether the process of a tracked run is gone for certain."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from ssmlora_dist.tracking.processes import _FIRST_NAMESPACE, Process, _start


@pytest.fixture
def own() -> Process:
    process = Process.own()
    assert process is not None
    # A bare machine, wherever the test runs.
    return replace(process, namespace=_FIRST_NAMESPACE, machine="m")


def test_a_process_is_known_by_its_tags(own: Process) -> None:
    assert Process.of_tags({**own.tags(), "git.commit": "x"}) == own
    assert own.pid == str(os.getpid())
    assert Process.of_tags({"process.host": own.host}) is None


def test_this_process_is_alive(own: Process) -> None:
    assert not own.is_gone(own)


def test_a_number_that_was_given_anew_is_another_process(own: Process) -> None:
    assert replace(own, start="1").is_gone(own)


def test_a_process_that_ended_is_gone_also_while_its_parent_has_not_noticed(own: Process) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = replace(own, pid=str(child.pid), start=_start(child.pid))
        assert not process.is_gone(own)
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process.is_gone(own)
        child.wait()
    assert process.is_gone(own)


def test_a_machine_that_was_started_again_has_none_of_its_old_processes(own: Process) -> None:
    before = replace(own, boot="before")
    assert before.is_gone(own)
    # Two machines, or containers on them, may have one name.
    assert not replace(before, machine="n").is_gone(own)
    nameless = replace(own, machine="")
    assert not replace(before, machine="").is_gone(nameless)
    inside = replace(own, namespace="pid:[1]")
    assert not before.is_gone(inside)
    assert not replace(before, namespace="pid:[1]").is_gone(inside)


def test_what_cannot_be_seen_counts_as_alive(own: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = replace(own, start="1")
    assert not replace(lost, host="other").is_gone(own)
    # Another container with this name on this machine.
    assert not replace(lost, namespace="pid:[1]").is_gone(own)
    assert not replace(lost, pid="none").is_gone(own)

    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    # Of another user, of whom the system hides everything.
    monkeypatch.setattr(os, "kill", refuse)
    assert not replace(lost, pid=str(2**22)).is_gone(own)
