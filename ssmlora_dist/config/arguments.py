"""The command line that the launch scripts share: arguments, and errors turned into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from ssmlora_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, SSMLoRAError
from ssmlora_dist.progress import shown_by
from ssmlora_dist.tracking.console import ProgressDisplay
from ssmlora_dist.tracking.streams import UnreadError, make_lenient

EXIT_INTERRUPTED = 130
# What a shell says of a command that SIGPIPE has ended.
EXIT_UNREAD = 141
LOG_LEVELS = ("debug", "info", "warning", "error")
# Launchers end every rank as soon as one has ended: the others leave rank 0 this time to say why and to close
# its run at the tracker.
SECONDS_FOR_RANK_0 = 30.0


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that names its usage on one rank only."""

    def error(self, message: str) -> NoReturn:
        if _rank() != "0":
            time.sleep(SECONDS_FOR_RANK_0)
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


def run_command(main: Callable[[], int | None], *, ends_unread: bool = False) -> int:
    """Runs a script's `main` and gives the exit code: `sys.exit(run_command(main))`.

    Rank 0 shows the progress of long work. Output that cannot be written is given up, and changes neither the
    work nor the exit code.

    An error that the user can mend is shown without traceback, by rank 0: as a rule every rank meets it, and
    the launcher ends those that wait. One that is still there after a while met it alone, and shows it. Any
    other exception passes through with its traceback (exit code 1).

    Args:
        main: gives the exit code, or None for 0.
        ends_unread: of a command that does nothing but write to the standard output: it ends, with 141, when
            nobody reads that any more.
    """
    make_lenient(ends_unread=ends_unread)
    try:
        with ProgressDisplay(sys.stderr if _rank() == "0" else None) as display, shown_by(display.show):
            return main() or EXIT_DONE
    except SSMLoRAError as error:
        place = ""
        if _rank() != "0":
            if error.met_by_all:
                return error.exit_code
            time.sleep(SECONDS_FOR_RANK_0)
            place = f" on rank {_rank()}"
        print(f"{error.label}{place}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UnreadError:
        return EXIT_UNREAD


def _rank() -> str:
    return os.environ.get("RANK", "0")
