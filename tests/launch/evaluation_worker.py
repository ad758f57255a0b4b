"""Evaluations over forked processes: `python -m tests.launch.evaluation_worker RESULTS KILLED_AFTER CUT`.

Those that build on each other come in rounds. In one of them the process kills itself once it has written so
many batches, as nothing that can be caught would, and leaves its last row `CUT` of the way to its end.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .evaluation_cases import BAD, CONFIG_FILE, EVALUATE_SCRIPT
from .forking import run_side_by_side

FIRST, SECOND, RESCALED = (("--adapter", f"../{name}/adapter") for name in ("first", "second", "rescaled"))
KILLED = "killed"
# Output directories, and their copies as they were after the first round.
BEFORE = {"killed": "killed-before", "one": "one-before"}
ROUNDS: tuple[dict[str, tuple[str, ...]], ...] = (
    {
        "one": (*FIRST, "--out", "../one"),
        KILLED: (*FIRST, "--out", "../killed"),
        "base": (),
        "chosen": ("--tasks", "passkey", "--lengths", "288", "--no-base", *FIRST, "--out", "../chosen"),
        "all failed": ("--tasks", "passkey", "--lengths", "512", "--out", "../failed"),
        "beside": ("--tasks", "capitals", *SECOND),
        "dry": ("--dry-run", *FIRST, "--out", "../dry"),
    },
    {
        "resumed": (*FIRST, "--out", "../killed"),
        "again": (*FIRST, "--out", "../one"),
        "other adapter": (*SECOND, "--out", "../one"),
    },
    {"other scale": (*RESCALED, "--out", "../one")},
)


def evaluate(arguments: tuple[str, ...], overrides: tuple[str, ...] = ()) -> int:
    """Runs the script as the command line would; its exit code."""
    settings = ("--set", *overrides) if overrides else ()
    sys.argv = [str(EVALUATE_SCRIPT), "--config", f"../{CONFIG_FILE}", *arguments, *settings]
    runpy.run_path(str(EVALUATE_SCRIPT), run_name="__main__")
    return 0


def doomed(arguments: tuple[str, ...], killed_after: int, cut: float) -> int:
    """The same, until it dies."""
    from ssmlora_dist.evaluation.item_rows import PartFile

    append, count = PartFile.append, [0]

    def append_and_die(self: Any, rows: Any) -> None:
        before = self._path.stat().st_size
        append(self, rows)
        count[0] += 1
        if count[0] == killed_after:
            after = self._path.stat().st_size
            os.truncate(self._path, before + int(cut * (after - before)))
            os.kill(os.getpid(), signal.SIGKILL)

    PartFile.append = append_and_die  # type: ignore[method-assign]
    return evaluate(arguments)


def main() -> None:
    results, killed_after, cut = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    found: dict[str, Any] = {}
    for cases in ROUNDS:
        actions = {name: [partial(evaluate, arguments)] for name, arguments in cases.items()}
        if KILLED in cases:
            actions[KILLED] = [partial(doomed, cases[KILLED], killed_after, cut)]
        found |= run_side_by_side(actions, Path.cwd(), num_at_once=2)
        for name in BEFORE if cases is ROUNDS[0] else ():
            shutil.copytree(name, BEFORE[name])
    bad = {f"bad {name}": [partial(evaluate, case.arguments, case.overrides)] for name, case in BAD.items()}
    found |= run_side_by_side(bad, Path.cwd(), num_at_once=2)
    results.write_text(json.dumps({name: ranks[0] for name, ranks in found.items()}))


if __name__ == "__main__":
    main()
