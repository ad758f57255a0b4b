"""A sweep over the fakes in a process of its own, which prints the rows: `-m tests.sweep.run_fakes SWEEP`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from ssmlora_dist.sweep.execute import run_sweep
from ssmlora_dist.sweep.plan import plan_sweep

from .sweeps import resources

if __name__ == "__main__":
    result = run_sweep(plan_sweep(sys.argv[1]), resources())
    print(json.dumps([asdict(row) for row in result.rows.values()]))
    sys.exit(0 if result.stopped_by is None else 128 + result.stopped_by)
