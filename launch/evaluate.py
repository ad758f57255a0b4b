"""Evaluates a model on tasks: `deepspeed launch/evaluate.py --config C [--adapter DIR] [--tasks ...]`."""

from __future__ import annotations

import sys
from typing import Any

from ssmlora_dist.config.arguments import build_parser, run_command
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.devices import device_type
from ssmlora_dist.errors import DataError
from ssmlora_dist.ranks import read_launch_environment
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    parser = build_parser("Evaluate a base model, and an adapter on it, on tasks.")
    add = parser.add_argument
    add(
        "--adapter",
        type=path_argument,
        metavar="DIR",
        help="adapter or checkpoint; by default the base model alone",
    )
    add("--tasks", nargs="+", default=[], metavar="NAME", help="by default those in evaluation.tasks")
    add("--lengths", nargs="+", type=int, default=[], metavar="TOKENS", help="of generated tasks")
    add("--out", type=path_argument, metavar="DIR", help="by default beside the adapter, or beside the run")
    add("--no-base", action="store_true", help="do not evaluate the base model beside the adapter")
    arguments = parser.parse_args()
    environment = read_launch_environment()
    quiet_libraries(arguments.log_level, environment.is_main)
    if arguments.adapter is not None and not arguments.adapter.is_dir():
        raise DataError(f"--adapter {arguments.adapter}: no such directory; name that of an adapter")
    if any(length < 64 for length in arguments.lengths):
        raise DataError(f"--lengths {min(arguments.lengths)}: allowed: at least 64 tokens; name longer ones")
    if arguments.no_base and arguments.adapter is None:
        raise DataError("--no-base: leaves nothing to evaluate without --adapter; name one, or leave it out")

    from ssmlora_dist.config.loading import load_config

    device = device_type()
    config = load_config(arguments.config, arguments.overrides, device_type=device, for_training=False)

    from ssmlora_dist.distributed.context import start_process_group, stop_process_group
    from ssmlora_dist.tracking import Console
    from ssmlora_dist.training.determinism import determinism
    from ssmlora_dist.training.task_evaluation import describe_evaluation, run_evaluation

    console = Console(enabled=environment.is_main)
    chosen: dict[str, Any] = {
        "adapter": arguments.adapter,
        "out": arguments.out,
        "names": arguments.tasks,
        "lengths": arguments.lengths,
    }
    if arguments.dry_run:
        text = describe_evaluation(config, device, environment.world_size, **chosen, warn=console.warn)
        console.message(text)
        return
    context = start_process_group(
        config.parallel.timeout_seconds, verbose=arguments.log_level in ("info", "debug")
    )
    quiet_libraries(arguments.log_level, environment.is_main)
    try:
        with determinism(config, context.device):
            run_evaluation(config, context, console, **chosen, with_base=not arguments.no_base)
    finally:
        stop_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main))
