"""One rank of all jobs that are for so many ranks: `python -m tests.distributed.pipeline_worker`."""

from __future__ import annotations

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.distributed.context import start_process_group, stop_process_group
from ssmlora_dist.tracking import Console, quiet_libraries
from ssmlora_dist.training.lack_of_memory import REHEARSING_DEVICES
from ssmlora_dist.training.run import run_training

from ..launch.preloaded import hide_plots
from ..launch.processes import DEBUG_TINY
from .pipeline_jobs import COMMON, JOBS, directory_name

TIMEOUT_SECONDS = 120


def main() -> None:
    quiet_libraries()
    hide_plots()
    context = start_process_group(TIMEOUT_SECONDS)
    if context.world_size > 1:
        # Which must change no bit either.
        REHEARSING_DEVICES.add("cpu")
    try:
        for job, (num_ranks, overrides) in JOBS.items():
            if num_ranks == context.world_size:
                own = f"run.name={directory_name(job)}"
                config = load_config(DEBUG_TINY, [own, *COMMON, *overrides], device_type="cpu")
                run_training(config, context, Console(enabled=False))
    finally:
        stop_process_group()


if __name__ == "__main__":
    main()
