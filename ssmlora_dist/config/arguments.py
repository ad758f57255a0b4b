"""The command line that the launch scripts share: arguments, and errors turned into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from ssmlora_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, SSMLoRAError

EXIT_INTERRUPTED = 130
LOG_LEVELS = ("debug", "info", "warning", "error")


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that names its usage on one rank only."""

    def error(self, message: str) -> NoReturn:
        if not _speaks():
            sys.exit(EXIT_BAD_INPUT)
        super().error(message)


def build_parser(description: str) -> ArgumentParser:
    """The arguments that every script taking a run configuration has; scripts add their own.

    Parsed, they are `config`, `overrides` (a list of `a.b=value`), `dry_run`, `log_level` and `local_rank`.
    """
    parser = ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="run configuration (JSON)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override a field of the configuration, such as training.max_steps=100; repeatable",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and stop before the work")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="warning", help="(default: %(default)s)")
    # DeepSpeed's launcher passes it; ranks are read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def run_command(main: Callable[[], int | None]) -> int:
    """Runs a script's `main` and gives the exit code: `sys.exit(run_command(main))`.

    An error that the user can mend is shown without traceback, on rank 0 only, since every rank meets it;
    any other exception passes through with its traceback (exit code 1).
    """
    try:
        return main() or EXIT_DONE
    except SSMLoRAError as error:
        if _speaks():
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"
