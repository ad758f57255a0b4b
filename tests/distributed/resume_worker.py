"""One rank of all runs that are for so many ranks: `python -m tests.distributed.resume_worker PHASE`."""

from __future__ import annotations

import sys
from pathlib import Path

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.distributed import loss_scale
from ssmlora_dist.distributed.context import DistributedContext, start_process_group, stop_process_group
from ssmlora_dist.tracking import Console, quiet_libraries
from ssmlora_dist.training.run import run_training

from ..launch.preloaded import hide_plots
from ..launch.processes import DEBUG_TINY
from .resume_jobs import COMMON, MIDDLE, PAIRS, RUNS, STEADY_STEPS, continued

TIMEOUT_SECONDS = 120


def main() -> None:
    quiet_libraries()
    hide_plots()
    loss_scale.STEADY_STEPS = STEADY_STEPS
    context = start_process_group(TIMEOUT_SECONDS)
    try:
        for name, (num_ranks, _) in RUNS.items():
            if num_ranks != context.world_size:
                continue
            if sys.argv[1] == "begin":
                train(context, name, name, "never")
                continue
            for then in (then for then, now in PAIRS if now == name):
                source = Path("runs") / then / "checkpoints" / f"step-{MIDDLE:08d}"
                train(context, name, continued(then, name), str(source))
    finally:
        stop_process_group()


def train(context: DistributedContext, topology: str, run_name: str, resume: str) -> None:
    """One run, whole or the second half of another."""
    overrides = [f"run.name={run_name}", *COMMON, *RUNS[topology][1]]
    run_training(
        load_config(DEBUG_TINY, overrides, device_type="cpu"), context, Console(enabled=False), resume
    )


if __name__ == "__main__":
    main()
