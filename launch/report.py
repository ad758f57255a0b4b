"""Writes the report of a sweep: `python launch/report.py --sweep sweeps/NAME`."""

from __future__ import annotations

import sys

from ssmlora_dist.config.arguments import ArgumentParser, run_command
from ssmlora_dist.config.paths import path_argument
from ssmlora_dist.tracking.quiet import quiet_libraries


def main() -> None:
    parser = ArgumentParser(
        description="Report on a sweep: tables and plots as an HTML page and as Markdown.",
        epilog="Runs made elsewhere: name a file with a JSON object on each line, with `point` (its name), "
        "`group`, `seed`, `outcome` (finished, failed, out_of_memory, stopped or not_run) and, where known, "
        "`reason`, `overrides` (dotted configuration keys), `metrics` (such as final_loss, "
        "tokens_per_second, peak_memory_gib, num_trainable_parameters, task/NAME/LENGTH/DEPTH) and "
        "`wall_seconds`.",
    )
    add = parser.add_argument
    add(
        "--sweep",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="sweep directory, or a file of rows as its points.jsonl",
    )
    add("--out", type=path_argument, metavar="DIR", help="by default `report` in the sweep directory")
    add("--baseline", metavar="GROUP", help="that the others are compared with; by default the sweep's own")
    arguments = parser.parse_args()
    quiet_libraries()

    from ssmlora_dist.sweep.report import write_report

    for path in write_report(arguments.sweep, arguments.out, arguments.baseline)[:2]:
        print(path)


if __name__ == "__main__":
    sys.exit(run_command(main, alone=True))
