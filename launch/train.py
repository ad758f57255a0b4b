"""Trains an adapter: `deepspeed launch/train.py --config configs/llama_ssmlora.json`.

Also runs under torchrun, srun and plain python.
"""

from __future__ import annotations

import os
import sys

# On a CPU machine ranks and threads share the cores: one that waits must not spin. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from ssmlora_dist.config.arguments import build_parser, run_command
from ssmlora_dist.config.paths import name_argument
from ssmlora_dist.devices import device_type
from ssmlora_dist.ranks import read_launch_environment
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    parser = build_parser("Train an SSMLoRA or LoRA adapter on a frozen, quantised decoder model.")
    parser.add_argument(
        "--resume",
        type=name_argument,
        default="never",
        metavar="auto|DIR|never",
        help="continue from the newest checkpoint of the run, where there is one (auto), or from that of a "
        "directory (default: %(default)s)",
    )
    arguments = parser.parse_args()
    environment = read_launch_environment()
    quiet_libraries(arguments.log_level, environment.is_main)

    from ssmlora_dist.config.loading import load_config

    device = device_type()
    config = load_config(arguments.config, arguments.overrides, device_type=device)

    from ssmlora_dist.distributed.context import start_process_group, stop_process_group
    from ssmlora_dist.tracking import Console

    console = Console(enabled=environment.is_main)
    if arguments.dry_run:
        from ssmlora_dist.training.describe import describe

        console.message(describe(config, device, environment.world_size, arguments.resume, console.warn))
        return

    from ssmlora_dist.training.run import run_training

    context = start_process_group(
        config.parallel.timeout_seconds, verbose=arguments.log_level in ("info", "debug")
    )
    quiet_libraries(arguments.log_level, environment.is_main)
    try:
        run_training(config, context, console, arguments.resume)
    finally:
        stop_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main))
