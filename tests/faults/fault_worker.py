"""Runs to which something happens, over forked ranks: `python -m tests.faults.fault_worker RESULTS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ..launch.preloaded import hide_plots
from .harness import play
from .stories import stories


def main() -> None:
    hide_plots()
    directory = Path.cwd()
    Path(sys.argv[1]).write_text(json.dumps(play(stories(directory), directory, num_at_once=2)))


if __name__ == "__main__":
    main()
