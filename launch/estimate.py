"""What a run takes: `python launch/estimate.py --config FILE --devices 8 --device-memory-gib 80`.

Reads the configuration and, of a model, its config.json: neither weights nor data, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import sys

from ssmlora_dist.config.arguments import build_parser, run_command
from ssmlora_dist.errors import EXIT_BAD_INPUT
from ssmlora_dist.tracking.quiet import quiet_libraries


def _size(text: str) -> float:
    if not 0 < (size := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text} given; allowed: GiB above 0; write a number such as 80")
    return size


def _number(text: str) -> int:
    if not 0 < (number := int(text)) <= 4096:
        raise argparse.ArgumentTypeError(f"{text} given; allowed: 1 to 4096; write a number such as 8")
    return number


def main() -> int | None:
    parser = build_parser("Estimate memory and time of a run, and find the settings that fit.", works=False)
    add = parser.add_argument
    add("--devices", type=_number, default=1, metavar="N", help="GPUs, each with a rank (default: 1)")
    add("--device-memory-gib", type=_size, required=True, metavar="GIB", help="of a GPU")
    add("--host-memory-gib", type=_size, metavar="GIB", help="of a node (default: enough)")
    arguments = parser.parse_args()
    quiet_libraries(arguments.log_level)

    from ssmlora_dist.config.loading import load_config
    from ssmlora_dist.training.planner import Planner, estimate_text

    config = load_config(
        arguments.config, arguments.overrides, world_size=arguments.devices, check_files=False
    )
    planner = Planner(
        config.with_auto_dtype("bfloat16"),
        arguments.devices,
        arguments.device_memory_gib,
        arguments.host_memory_gib,
    )
    text, fits = estimate_text(planner)
    print(text)
    return None if fits else EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
