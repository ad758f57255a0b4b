"""The error that ends a process: shown once, by whoever comes first of the command and what may never end."""

from __future__ import annotations

import sys
import time
import traceback

from ssmlora_dist.errors import ConfigError, SSMLoRAError
from ssmlora_dist.ranks import LaunchEnvironment, read_launch_environment

# Launchers end every rank as soon as one has ended: the others leave rank 0 this time to say why and to close
# its run at the tracker.
SECONDS_FOR_RANK_0 = 30.0
_SHOWN = "_ssmlora_dist_has_shown_it"


def show_error(error: BaseException) -> None:
    """Shows an error on the standard error stream, unless that has been done.

    One that the user can mend is shown without traceback, by rank 0: as a rule every rank meets it, and the
    launcher ends those that wait. One that is still there after a while met it alone, and shows it. Any other
    is shown with its traceback at once.
    """
    if is_shown(error):
        return
    setattr(error, _SHOWN, True)
    if not isinstance(error, SSMLoRAError):
        traceback.print_exception(error)
        return
    rank, on_rank = launch_environment().rank, ""
    if rank != 0:
        if error.met_by_all:
            return
        time.sleep(SECONDS_FOR_RANK_0)
        on_rank = f" on rank {rank}"
    print(f"{error.label}{on_rank}: {error}", file=sys.stderr, flush=True)


def is_shown(error: BaseException) -> bool:
    """Whether `show_error` has shown it."""
    return hasattr(error, _SHOWN)


def launch_environment() -> LaunchEnvironment:
    """Who this process is; whoever does not know it is alone, and speaks."""
    try:
        return read_launch_environment()
    except ConfigError:
        return LaunchEnvironment()
