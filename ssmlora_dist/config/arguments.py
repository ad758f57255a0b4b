"""The command line that the launch scripts share: arguments, and errors turned into exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ssmlora_dist.config.paths import name_argument, path_argument
from ssmlora_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_UNFORESEEN, ConfigError, SSMLoRAError
from ssmlora_dist.last_words import SECONDS_FOR_RANK_0, is_shown, launch_environment, show_error
from ssmlora_dist.progress import shown_by
from ssmlora_dist.signals import StopRequested, raise_on_stop_signals
from ssmlora_dist.tracking.console import ProgressDisplay
from ssmlora_dist.tracking.streams import UnreadError, make_lenient

EXIT_INTERRUPTED = 130
# What a shell says of a command that SIGPIPE has ended.
EXIT_UNREAD = 141
LOG_LEVELS = ("debug", "info", "warning", "error")


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that names its usage on one rank only."""

    def error(self, message: str) -> NoReturn:
        if launch_environment().rank != 0:
            time.sleep(SECONDS_FOR_RANK_0)
            sys.exit(EXIT_BAD_INPUT)
        super().error(message)


def build_parser(description: str, *, works: bool = True) -> ArgumentParser:
    """The arguments that every script taking a run configuration has; scripts add their own.

    Parsed, they are `config`, `overrides` (a list of `a.b=value`), `log_level`, `local_rank` and, of a script
    that `works` after its checks, `dry_run`.
    """
    parser = ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--config", type=path_argument, required=True, metavar="FILE", help="run configuration (JSON)")
    add(
        "--set",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override a field of the configuration, such as training.max_steps=100; repeatable",
    )
    if works:
        add("--dry-run", action="store_true", help="check everything and stop before the work")
    add("--log-level", choices=LOG_LEVELS, default="warning", help="(default: %(default)s)")
    # DeepSpeed's launcher passes it; ranks are read from the environment.
    add("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def build_adapter_parser(description: str) -> ArgumentParser:
    """The arguments that every script which loads a trained adapter has, for `config.build.load_trained`.

    Parsed, they are `adapter`, `model`, `quantization`, `dtype` and `form_module`.
    """
    parser = ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "--adapter",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="adapter directory of a run, or PEFT's LoRA",
    )
    add(
        "--model",
        type=name_argument,
        metavar="PATH",
        help="the base model, where it is not where it was in training",
    )
    add(
        "--quantization",
        choices=("nf4", "fp4", "int8", "none"),
        help="of the base model; by default what the adapter was trained on, or none where that is not known",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the base model; by default that of training, or that of the stored weights",
    )
    add(
        "--form-module",
        type=name_argument,
        metavar="MODULE",
        help="Python file or module that registers the adapter's form of the state, if it is one of your own",
    )
    return parser


def run_command(main: Callable[[], int | None], *, alone: bool = False, ends_unread: bool = False) -> int:
    """Runs a script's `main` and gives the exit code: `sys.exit(run_command(main))`.

    Rank 0 shows the progress of long work. Output that cannot be written is given up, and changes neither the
    work nor the exit code.

    An error that the user can mend is shown by `show_error`. A signal that the script does not heed by itself
    ends it with 128 and the signal's number. Any other exception passes through with its traceback (exit
    code 1), unless that has been shown.

    Args:
        main: gives the exit code, or None for 0.
        alone: whether the script does its work in one process, of which several would do the same.
        ends_unread: of a command that does nothing but write to the standard output: it ends, with 141, when
            nobody reads that any more, and with an error when it cannot be written.
    """
    make_lenient(ends_unread=ends_unread)
    try:
        if alone and (number := launch_environment().world_size) > 1:
            problem = (
                f"{number} processes were started; allowed: one; start it with plain python, or `srun -n 1`"
            )
            raise ConfigError([problem], source=Path(sys.argv[0]).name)
        stream = sys.stderr if launch_environment().rank == 0 else None
        with raise_on_stop_signals(), ProgressDisplay(stream) as display, shown_by(display.show):
            return main() or EXIT_DONE
    except SSMLoRAError as error:
        show_error(error)
        return error.exit_code
    except StopRequested as request:
        if launch_environment().rank == 0:
            print(f"stopped: by {signal.Signals(request.signum).name}", file=sys.stderr)
        return 128 + request.signum
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except UnreadError:
        return EXIT_UNREAD
    except Exception as error:
        if is_shown(error):
            return EXIT_UNFORESEEN
        raise
