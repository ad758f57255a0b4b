"""Repeats a row: `python benchmarks/accuracy/repeat.py final/generated/144/paper/0.005/201`.

The commit that has left the row is checked out beside the repository, the run is done again by its own code,
and the new scores are compared with the row's: the same bits, or by how much they differ beside the spread of
the seeds. The same bits are a promise on the same machine and versions alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The study lies beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.accuracy import plan
from benchmarks.accuracy.rows import read_rows
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.errors import DataError


def find(rows: Sequence[Mapping[str, Any]], name: str, path: Path) -> dict[str, Mapping[str, Any]]:
    """The rows of the run of a name, by task.

    Raises:
        DataError: there is no such run.
    """
    by_name = {str(run): by_task for run, by_task in plan.done(rows).items()}
    if name not in by_name:
        raise DataError(
            f"{path}: has no run {name!r}; runs are called PHASE/TASK_SET/LENGTH/METHOD/RATE/SEED, such as "
            f"{', '.join(list(by_name)[:3]) or 'none: the file has no rows'}; name one of these"
        )
    return by_name[name]


def spread(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float | None:
    """Standard deviation of the loss over the seeds of the row's phase, method, task, length and rate."""
    keys = ("phase", "method", "task", "length", "rate")
    alike = [other["loss"] for other in rows if all(other[key] == row[key] for key in keys)]
    losses = [loss for loss in alike if loss is not None]
    return statistics.stdev(losses) if len(losses) > 1 else None


def verdict(old: Mapping[str, Any], new: Mapping[str, Any], noise: float | None) -> tuple[str, bool]:
    """What to say of a row and its repetition, and whether they agree."""
    if (old["loss"], old["accuracy"]) == (new["loss"], new["accuracy"]):
        return "the same bits", True
    if old["loss"] is None or new["loss"] is None:
        return "one of the two has diverged", False
    difference = new["loss"] - old["loss"]
    if noise is None:
        return f"{difference:+.5f} nats; no other seed to compare it with", False
    word = "within" if abs(difference) <= noise else "beyond"
    return f"{difference:+.5f} nats, {word} the seeds' standard deviation of {noise:.5f}", word == "within"


def _repeat(row: Mapping[str, Any], commit: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    setting = row["setting"]
    given = {
        "task-set": row["task_set"],
        **{key: row[key] for key in ("method", "rate", "seed", "phase", "length")},
        "model": arguments.model.resolve(),
        "device": row["device"],
        "cache": arguments.cache.resolve(),
        **{
            key.replace("_", "-"): setting[key]
            for key in ("first_layer", "steps", "batch", "num_train", "num_validation", "num_test")
        },
    }
    if arguments.babi is not None:
        given["babi"] = arguments.babi.resolve()
    git = ["git", "-C", str(plan.ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as scratch:
        tree, rows = Path(scratch) / "tree", Path(scratch) / "rows.jsonl"
        done = subprocess.run([*git, "add", "--detach", str(tree), commit], capture_output=True, text=True)
        if done.returncode != 0:
            raise DataError(f"commit {commit} cannot be checked out: {done.stderr.strip()}; fetch it first")
        try:
            words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
            script = tree / "benchmarks" / "accuracy" / "run.py"
            subprocess.run([sys.executable, str(script), *words, "--rows", str(rows)], check=True, cwd=tree)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True, check=False)
        return read_rows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Repeat a run from its commit and seed.")
    add = parser.add_argument
    add("run", metavar="ROW", help="PHASE/TASK_SET/LENGTH/METHOD/RATE/SEED")
    add("--model", type=path_argument, default=plan.MODEL, metavar="DIR", help="(default: %(default)s)")
    add("--babi", type=path_argument, metavar="DIR", help="bAbI files, for the task set babi")
    add("--cache", type=path_argument, default=plan.CACHE, metavar="DIR", help="(default: %(default)s)")
    plan.add_rows_argument(parser)
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    old = find(rows, arguments.run, arguments.rows)
    git = next(iter(old.values()))["environment"]["git"]
    if git is None:
        raise DataError(
            f"{arguments.run}: was run outside of a repository; there is no commit to repeat it from"
        )
    if git["dirty"]:
        print(
            f"{arguments.run}: was run with changes that commit {git['commit']} does not have",
            file=sys.stderr,
        )
    agree = []
    for new in _repeat(next(iter(old.values())), git["commit"], arguments):
        row = old[new["task"]]
        words, is_equal = verdict(row, new, spread(rows, row))
        agree.append(is_equal)
        was, now = (math.nan if one["loss"] is None else one["loss"] for one in (row, new))
        print(f"{new['task']}: loss {was:.5f}, repeated {now:.5f}: {words}")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
