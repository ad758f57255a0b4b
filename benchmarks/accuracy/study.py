"""The whole study: `nice python benchmarks/accuracy/study.py --workers 2`, on a GPU `--device cuda`.

Runs that have their rows already are skipped, so it can be stopped (Ctrl-C, a kill, `--budget-minutes`) and
started again with the same arguments. A worker is a process with one thread and one model.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

# The study lies beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.accuracy import plan
from benchmarks.accuracy.rows import append_rows, read_rows
from benchmarks.accuracy.training import Resources, check, execute, prepare, upper_model
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.signals import StopRequested
from ssmlora_dist.tracking.environment import environment_record
from ssmlora_dist.tracking.quiet import quiet_libraries


class _Worker:
    """A process's model, by the setting that it was made for."""

    setting: plan.Setting | None = None
    model: Any = None


def work(run: plan.Run, setting: plan.Setting, resources: Resources) -> list[dict[str, Any]]:
    """A run's rows, in a worker's process."""
    if _Worker.setting is None or _Worker.setting.first_layer != setting.first_layer:
        _Worker.model = upper_model(setting, resources)
    _Worker.setting = setting
    return execute(run, setting, resources, _Worker.model)


def _begin() -> None:
    # Ctrl-C reaches the whole group; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet_libraries()
    torch.set_num_threads(1)


def run_all(
    cells: list[tuple[str, int, str]],
    settings: dict[int, plan.Setting],
    resources: Resources,
    path: Path,
    workers: int,
    budget_seconds: float | None,
) -> bool:
    """Starts runs until none is left; returns whether there are any that the budget has not allowed."""
    began, longest, environment = time.monotonic(), 0.0, environment_record()
    rows: list[dict[str, Any]] = read_rows(path)
    started: dict[Future[list[dict[str, Any]]], tuple[plan.Run, float]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin) as pool:
        try:
            while True:
                in_flight = {run for run, _ in started.values()}
                waiting = [run for run in plan.next_runs(rows, cells) if run not in in_flight]
                now = time.monotonic()
                in_time = budget_seconds is None or now - began + longest < budget_seconds
                while waiting and len(started) < workers and in_time:
                    run = waiting.pop(0)
                    started[pool.submit(work, run, settings[run.length], resources)] = run, now
                if not started:
                    return bool(waiting)
                for future in wait(started, return_when=FIRST_COMPLETED).done:
                    run, at = started.pop(future)
                    longest = max(longest, time.monotonic() - at)
                    new = [row | {"environment": environment} for row in future.result()]
                    append_rows(path, new)
                    rows += new
                    left = plan.num_runs_left(rows, cells)
                    print(f"{run}: {'; '.join(map(plan.summary, new))}; {left} left", flush=True)
        except BaseException:
            # What has not ended leaves no row, and is run again.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def main() -> int | None:
    parser = argparse.ArgumentParser(
        description="Run, or go on with, the study of benchmarks/accuracy/README.md."
    )
    add = parser.add_argument
    add("--task-sets", nargs="+", choices=sorted(plan.TASK_SETS), default=["generated", "prose"])
    add("--methods", nargs="+", choices=list(plan.METHODS), default=list(plan.METHODS), metavar="METHOD")
    add("--lengths", nargs="+", type=int, default=[144], metavar="N", help="(default: %(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes (default: %(default)s)")
    add("--budget-minutes", type=float, metavar="N", help="start no run that may take longer than is left")
    add("--dry-run", action="store_true", help="say what is left and stop")
    plan.add_arguments(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    settings = {length: plan.setting_of(arguments, length) for length in arguments.lengths}
    cells = list(itertools.product(arguments.task_sets, arguments.lengths, arguments.methods))
    path = arguments.rows
    rows = read_rows(path)
    plan.check_settings(rows, settings.values(), path)
    resources = Resources(arguments.model, arguments.cache, arguments.device, arguments.babi)
    print(f"{path}: {len(rows)} rows; at least {plan.num_runs_left(rows, cells)} runs are left")
    if arguments.dry_run:
        return None
    budget = None if arguments.budget_minutes is None else 60 * arguments.budget_minutes
    began = time.monotonic()
    try:
        for setting in settings.values():
            check(setting, resources)
            prepare(arguments.task_sets, setting, resources)
        if budget is not None:
            budget -= time.monotonic() - began
        is_left = run_all(cells, settings, resources, path, arguments.workers, budget)
    except (KeyboardInterrupt, StopRequested):
        print(
            f"stopped; at least {plan.num_runs_left(read_rows(path), cells)} runs are left", file=sys.stderr
        )
        raise
    if is_left:
        print(f"out of time; at least {plan.num_runs_left(read_rows(path), cells)} runs are left")
    return None


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
