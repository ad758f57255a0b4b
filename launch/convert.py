"""Takes the adapter out of a checkpoint: `python launch/convert.py --checkpoint DIR --out DIR`."""

from __future__ import annotations

import sys

from ssmlora_dist.config.arguments import ArgumentParser, run_command
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    parser = ArgumentParser(
        description="Extract the adapter directory from a checkpoint, verifying it first."
    )
    parser.add_argument(
        "--checkpoint",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="such as runs/NAME/checkpoints/step-...",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="adapter directory to make; must not exist",
    )
    arguments = parser.parse_args()
    quiet_libraries()

    from ssmlora_dist.training.checkpoints import extract_adapter

    extract_adapter(arguments.checkpoint, arguments.out)
    print(f"{arguments.out}: the adapter of {arguments.checkpoint}")


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
