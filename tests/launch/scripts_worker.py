"""Many command lines in one process: `python -m tests.launch.scripts_worker COMMANDS RESULTS`.

Each runs a script as `python script.py arguments` would, in a fresh `__main__`, but without importing torch
and the rest anew. COMMANDS holds a JSON list of argument lists, each beginning with the script; RESULTS gets
the exit code, standard output and standard error of each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def run_script(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command line."""
    variables = dict(os.environ)
    sys.argv = arguments
    exit_code = 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
    ):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as exit_:
            exit_code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BaseException:
            traceback.print_exc()
            exit_code = 1
    # A script that starts a process group puts its rank there.
    os.environ.clear()
    os.environ.update(variables)
    return exit_code, stdout.getvalue(), stderr.getvalue()


if __name__ == "__main__":
    commands, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps([run_script(arguments) for arguments in json.loads(commands.read_text())]))
