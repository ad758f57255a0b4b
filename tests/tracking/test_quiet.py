from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[2] / "ssmlora_dist" / "tracking" / "quiet.py"

# The file by itself: the package imports torch, which takes seconds and has loggers of its own.
LOAD = f"""
import importlib.util
specification = importlib.util.spec_from_file_location("quiet", {str(MODULE)!r})
quiet = importlib.util.module_from_spec(specification)
specification.loader.exec_module(quiet)
quiet_libraries = quiet.quiet_libraries
"""

# A stand-in for what the libraries do when they are imported and used: DeepSpeed makes its logger with its
# own level and handler, the others warn on loggers and through `warnings`.
PROGRAM = """
import logging, sys, warnings

def speak():
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.warning("deepspeed warning")
    deepspeed.info("deepspeed info")
    logging.getLogger("bitsandbytes.backends.cpu").warning("bitsandbytes warning")
    logging.getLogger("transformers.modeling").error("transformers error")
    logging.getLogger("ssmlora_dist.training").warning("our warning")
    warnings.warn_explicit("torch future", FutureWarning, "file", 1, module="torch.distributed.c10d_logger")
    warnings.warn_explicit("our future", FutureWarning, "file", 1, module="ssmlora_dist.training")

level = sys.argv[1]
quiet_libraries(level)
heavy = {"torch", "deepspeed", "transformers", "datasets", "mlflow", "bitsandbytes", "huggingface_hub"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
logger = logging.getLogger("DeepSpeed")
logger.setLevel(logging.WARNING)
logger.propagate = False
handler = logging.StreamHandler()
handler.setLevel(logging.WARNING)
logger.addHandler(handler)
if len(sys.argv) > 2:
    quiet_libraries(level)
speak()
"""


def spoken(*arguments: str, **variables: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD + PROGRAM, *arguments],
        env={**os.environ, "PYTHONWARNINGS": "", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return {line.split("Warning: ")[-1] for line in done.stderr.splitlines()}


def test_only_errors_of_the_libraries_are_shown() -> None:
    assert spoken("warning") == {"transformers error", "our warning", "our future"}


def test_a_user_who_asks_for_more_gets_it() -> None:
    everything = spoken("info", "again")
    assert everything == {
        "deepspeed warning",
        "deepspeed info",
        "bitsandbytes warning",
        "transformers error",
        "our warning",
        "torch future",
        "our future",
    }


@pytest.mark.parametrize(
    ("level", "given", "expected"),
    [("warning", None, "error"), ("debug", None, "debug"), ("warning", "info", "info")],
)
def test_a_variable_that_the_user_has_set_stays(level: str, given: str | None, expected: str) -> None:
    program = LOAD + (
        "import os, sys; quiet_libraries(sys.argv[1]); print(os.environ['TRANSFORMERS_VERBOSITY'])"
    )
    variables = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    if given is not None:
        variables["TRANSFORMERS_VERBOSITY"] = given
    done = subprocess.run(
        [sys.executable, "-c", program, level],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.strip() == expected
