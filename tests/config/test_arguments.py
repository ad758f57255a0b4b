from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from ssmlora_dist.config.arguments import EXIT_INTERRUPTED, build_parser, run_command
from ssmlora_dist.errors import EXIT_BAD_INPUT, EXIT_TRAINING_FAILED, ConfigError, TrainingError
from ssmlora_dist.last_words import show_error
from ssmlora_dist.ranks import VARIABLES, read_launch_environment


def test_overrides_are_gathered_in_order() -> None:
    command = (
        "--config c.json --set a.b=1 c.d=2 --local_rank=3 --set e.f=x --dry-run --log-level info".split()
    )
    arguments = build_parser("test").parse_args(command)
    assert arguments.config == Path("c.json")
    assert arguments.overrides == ["a.b=1", "c.d=2", "e.f=x"]
    assert arguments.dry_run
    assert arguments.log_level == "info"
    assert arguments.local_rank == 3


def test_defaults() -> None:
    arguments = build_parser("test").parse_args(["--config", "c.json"])
    assert arguments.overrides == []
    assert not arguments.dry_run
    assert arguments.log_level == "warning"
    # The parser must not keep one list for all calls.
    build_parser("test").parse_args(["--config", "c.json", "--set", "a=1"])
    assert build_parser("test").parse_args(["--config", "c.json"]).overrides == []


@pytest.mark.parametrize("command", [[], ["--config"], ["--conf", "c.json"], ["--config", "c", "--nonsense"]])
def test_usage_errors_exit_with_2(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser("test").parse_args(command)
    assert caught.value.code == EXIT_BAD_INPUT
    assert "usage:" in capsys.readouterr().err


def test_other_ranks_let_rank_0_speak_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends them in that time, unless the error is theirs alone."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)

    def fail() -> NoReturn:
        raise ConfigError(["run.name: missing"])

    for rank, usage, start, waits in (("0", "usage:", "error: ", []), ("1", "", "error on rank 1: ", [30.0])):
        set_rank(monkeypatch, rank)
        assert run_command(fail) == EXIT_BAD_INPUT
        shown = capsys.readouterr().err
        assert shown.startswith(start)
        assert "run.name: missing" in shown
        assert waited == waits
        with pytest.raises(SystemExit) as caught:
            build_parser("test").parse_args([])
        assert caught.value.code == EXIT_BAD_INPUT
        assert usage in capsys.readouterr().err
        assert waited == waits * 2


def test_an_error_is_shown_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever may never come back from what follows shows it before."""
    set_rank(monkeypatch, "0")

    def fail(error: Exception) -> NoReturn:
        try:
            raise error
        except Exception:
            show_error(error)
            raise

    assert run_command(lambda: fail(TrainingError("diverged"))) == EXIT_TRAINING_FAILED
    assert capsys.readouterr().err == "error: diverged\n"
    assert run_command(lambda: fail(ValueError("odd"))) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.count("ValueError: odd") == 1


def set_rank(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    launch = {"LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    for name, value in {**launch, "RANK": rank}.items():
        monkeypatch.setenv(name, value)


def test_a_script_of_one_process_is_not_run_by_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_rank(monkeypatch, "0")
    assert run_command(lambda: None) == 0
    assert run_command(lambda: None, alone=True) == EXIT_BAD_INPUT
    assert "2 processes were started; allowed: one" in capsys.readouterr().err
    # What says half of it says nothing that matters to one process.
    monkeypatch.delenv("RANK")
    assert run_command(lambda: None, alone=True) == 0


def test_a_rank_that_does_not_know_itself_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")

    def start() -> None:
        read_launch_environment()

    assert run_command(start) == EXIT_BAD_INPUT
    assert "RANK: given without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in capsys.readouterr().err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def diverge() -> NoReturn:
        raise TrainingError("diverged at step 3; the last good checkpoint is c/2")

    def interrupt() -> NoReturn:
        raise KeyboardInterrupt

    assert run_command(lambda: None) == 0
    assert run_command(lambda: 5) == 5
    assert run_command(diverge) == EXIT_TRAINING_FAILED
    assert capsys.readouterr().err == "error: diverged at step 3; the last good checkpoint is c/2\n"
    assert run_command(interrupt) == EXIT_INTERRUPTED == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "exit_code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR2", 140), ("SIGINT", 130)]
)
def test_a_signal_that_a_script_does_not_heed_itself_closes_what_is_open(name: str, exit_code: int) -> None:
    """Not even what a library does about any error is in the way."""
    script = (
        "import os, signal, sys, time\n"
        "from ssmlora_dist.config.arguments import run_command\n"
        "def main():\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        time.sleep(60)\n"
        "    except Exception:\n"
        "        pass\n"
        "    finally:\n"
        "        print('closed')\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(run_command(main))\n"
    )
    command = [sys.executable, "-c", script]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == exit_code
    assert finished.stdout == "closed\n"
    assert finished.stderr == ("" if name == "SIGINT" else f"stopped: by {name}\n")


def test_an_unexpected_exception_keeps_its_traceback() -> None:
    script = (
        "import sys\n"
        "from ssmlora_dist.config.arguments import run_command\n"
        "sys.exit(run_command(lambda: 1 / 0))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
    assert "ZeroDivisionError" in finished.stderr


def test_the_configuration_tier_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "import ssmlora_dist.adapters.config\n"
        "before = set(sys.modules)\n"
        "import ssmlora_dist.config.arguments, ssmlora_dist.config.loading\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'mlflow', 'datasets'}\n"
        "print(heavy & (set(sys.modules) - before))\n"
    )
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed == "set()\n"
