from __future__ import annotations

import pytest

from ssmlora_dist.sweep.outcome import LONGEST_REASON, outcome_of, stopped_reason

CUDA_LOG = """Traceback (most recent call last):
  File "train.py", line 1, in <module>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB
warning: MLflow was slow
"""


@pytest.mark.parametrize(
    ("code", "log", "outcome", "reason"),
    [
        (0, "all is well, nothing is out of memory", "finished", None),
        (1, CUDA_LOG, "out_of_memory", CUDA_LOG.splitlines()[2]),
        (
            247,
            "[rank1]: RuntimeError: CUDA error: out of memory\n",
            "out_of_memory",
            "[rank1]: RuntimeError: CUDA error: out of memory",
        ),
        (1, "MemoryError\n", "out_of_memory", "MemoryError"),
        (1, "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes", "out_of_memory", None),
        (-9, "", "failed", "killed by SIGKILL (exit code -9), by whom is not known"),
        (137, "step 1\n", "failed", "killed by SIGKILL (exit code 137)"),
        (247, "step 1\n", "failed", "killed by SIGKILL (exit code 247)"),
        (
            143,
            "stopped: by SIGTERM after step 3 of 9; saved\n",
            "stopped",
            "by SIGTERM after step 3 of 9; saved",
        ),
        (-15, "", "stopped", "told to stop by a signal (exit code -15)"),
        (-11, "", "failed", "ended by SIGSEGV"),
        (
            3,
            "error: step 4: loss or gradients were not finite in 5 steps in a row\n",
            "failed",
            "diverged: step 4: loss or gradients were not finite in 5 steps in a row (exit code 3)",
        ),
        (3, "error on rank 1: rank 0 was lost\n", "failed", "rank 0 was lost (exit code 3)"),
        (
            2,
            "error: run.json: 2 problems\n  adapter.rank: 0 given\n  more\nwarning: x\n",
            "failed",
            "run.json: 2 problems: adapter.rank: 0 given (exit code 2)",
        ),
        (
            1,
            "Traceback (most recent call last):\n  File\n[rank0]: ValueError: odd\n\n[launch] exits\n",
            "failed",
            "ValueError: odd (exit code 1)",
        ),
        (1, "Traceback\nKeyError: 'x'\n", "failed", "KeyError: 'x' (exit code 1)"),
        (5, "some words\n\n", "failed", "some words (exit code 5)"),
        (5, "", "failed", "it wrote nothing (exit code 5)"),
    ],
)
def test_outcome_and_reason(code: int, log: str, outcome: str, reason: str | None) -> None:
    found, said = outcome_of(code, log)
    assert found == outcome
    assert said == reason or (reason is not None and str(said).startswith(reason)) or (said and not reason)
    assert "\n" not in (said or "")


def test_a_reason_is_short() -> None:
    _, said = outcome_of(1, f"ValueError: {'x' * 1000}\n")
    assert len(said or "") == LONGEST_REASON


def test_a_stopped_run_says_where_it_stands() -> None:
    assert stopped_reason("stopped: early\nstopped: late\nerror: no\n") == "late"
    assert stopped_reason("error: no\n") is None


@pytest.mark.parametrize(
    ("kernel_killed", "outcome", "said"),
    [
        (True, "out_of_memory", "the machine or its container was out of memory"),
        (False, "failed", "by a person or a program"),
        (None, "failed", "by whom is not known"),
    ],
)
def test_the_kernel_s_kill_is_told_from_a_person_s(kernel_killed: bool, outcome: str, said: str) -> None:
    for code in (-9, 137, 247):
        found, reason = outcome_of(code, "step 1\n", kernel_killed)
        assert found == outcome
        assert (reason or "").startswith(f"killed by SIGKILL (exit code {code}), ")
        assert said in (reason or "")
    # What was told to stop, or failed, while something else was killed.
    assert outcome_of(-15, "", kernel_killed)[0] == "stopped"
    assert outcome_of(3, "error: diverged\n", kernel_killed)[0] == "failed"
