"""One run: `python benchmarks/accuracy/run.py --task-set generated --method paper --rate 0.01 --seed 101`.

Trains the method once and adds a row for each task of the set to the file of rows. Not with final seeds, but
to try something; the study itself is `study.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The study lies beside it.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.accuracy import plan
from benchmarks.accuracy.rows import append_rows, read_rows
from benchmarks.accuracy.training import Resources, check, execute, upper_model
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.tracking.environment import environment_record
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one method once and score it.")
    add = parser.add_argument
    add("--task-set", choices=sorted(plan.TASK_SETS), required=True)
    add("--method", choices=list(plan.METHODS), required=True)
    add("--rate", type=float, required=True, metavar="R", help="largest learning rate")
    add("--seed", type=int, required=True, metavar="N")
    add("--phase", choices=sorted(plan.SPLITS), default="tuning", help="(default: %(default)s)")
    add("--length", type=int, default=144, metavar="N", help="tokens of a text (default: %(default)s)")
    plan.add_arguments(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    setting = plan.setting_of(arguments, arguments.length)
    path = arguments.rows
    plan.check_settings(read_rows(path), [setting], path)
    resources = Resources(arguments.model, arguments.cache, arguments.device, arguments.babi)
    check(setting, resources)
    run = plan.Run(
        arguments.phase, arguments.task_set, setting.length, arguments.method, arguments.rate, arguments.seed
    )
    rows = execute(run, setting, resources, upper_model(setting, resources))
    environment = environment_record()
    append_rows(path, [row | {"environment": environment} for row in rows])
    for row in rows:
        print(f"{run}: {plan.summary(row)}")


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
