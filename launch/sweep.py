"""Runs a sweep: `python launch/sweep.py --config configs/sweeps/quick_cpu.json`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ssmlora_dist.config.arguments import ArgumentParser, run_command
from ssmlora_dist.config.paths import name_argument
from ssmlora_dist.devices import device_type
from ssmlora_dist.errors import EXIT_DONE, EXIT_TRAINING_FAILED
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> int:
    parser = ArgumentParser(
        description="Run the points of a sweep, or what is left of them.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", type=name_argument, required=True, metavar="FILE", help="sweep file (JSON)")
    add("--dry-run", action="store_true", help="check every point and show the plan")
    add("--retry-failed", action="store_true", help="run points again that failed or ran out of memory")
    arguments = parser.parse_args()
    quiet_libraries()

    import torch

    from ssmlora_dist.sweep.execute import Resources, run_sweep
    from ssmlora_dist.sweep.plan import plan_sweep, sweep_state_of
    from ssmlora_dist.sweep.process import visible_devices
    from ssmlora_dist.sweep.recording import check_stores
    from ssmlora_dist.sweep.table import counts, outcome_table, plan_text

    num_devices = torch.cuda.device_count() if device_type() == "cuda" else 0
    devices = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), num_devices)
    plan = plan_sweep(arguments.config, devices=devices)
    num_cpus = len(os.sched_getaffinity(0))
    resources = Resources(devices, num_cpus, Path(__file__).resolve().parent)
    for store in check_stores(plan, lambda text: print(f"warning: {text}", file=sys.stderr)):
        print(f"MLflow: {store}")
    if arguments.dry_run:
        state = sweep_state_of(plan, plan.directory.read_rows(), retry_failed=arguments.retry_failed)
        print(plan_text(plan, state, resources.points_at_once(plan)))
        return EXIT_DONE
    result = run_sweep(plan, resources, retry_failed=arguments.retry_failed)
    print(outcome_table(result.rows.values()))
    print(f"{plan.directory.path}: {len(result.rows)} points, {counts(result.rows.values())}")
    if result.stopped_by is not None:
        print("stopped: the same command goes on", file=sys.stderr)
        return 128 + result.stopped_by
    return EXIT_DONE if result.num_finished else EXIT_TRAINING_FAILED


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
