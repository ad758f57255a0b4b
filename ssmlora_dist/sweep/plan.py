"""A sweep's plan: every point with its checked configuration, and how long what is left will take."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ssmlora_dist.config.loading import load_config, read_json
from ssmlora_dist.config.paths import directory_refusal
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.shown import shown
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.progress import counted
from ssmlora_dist.sweep.digest import digest_of
from ssmlora_dist.sweep.directory import FINAL, Row, SweepDirectory
from ssmlora_dist.sweep.expansion import RANKS_KEY, Point, expand
from ssmlora_dist.sweep.schema import SweepConfig, load_sweep
from ssmlora_dist.tracking import choose_store

SHOWN_POINTS = 3


@dataclass(frozen=True)
class PlannedPoint:
    """A point that can be run.

    Attributes:
        point: what the sweep file says of it.
        config: of its run.
        digest: changes with whatever decides its results: the part before `+` with what decides the training,
            the part behind, where there is one, with the tasks that are answered afterwards.
    """

    point: Point
    config: RunConfig
    digest: str

    @property
    def name(self) -> str:
        return self.point.name

    @property
    def training_digest(self) -> str:
        return self.digest.partition("+")[0]

    def row(self, **outcome: Any) -> Row:
        """A row of points.jsonl about it."""
        point = self.point
        return Row(
            point=point.name,
            digest=self.digest,
            overrides=dict(point.overrides),
            group=point.group,
            seed=point.seed,
            **outcome,
        )


@dataclass(frozen=True)
class Plan:
    """A sweep whose points have all been checked."""

    sweep: SweepConfig
    directory: SweepDirectory
    points: Sequence[PlannedPoint]


def plan_sweep(path: str, *, devices: Sequence[str] = ()) -> Plan:
    """Reads a sweep file, expands it and checks the configuration of every point.

    Args:
        path: of the sweep file.
        devices: what CUDA_VISIBLE_DEVICES calls the devices there are; none: points compute on the CPU.

    Raises:
        ConfigError: with one line for every problem; the same one of many points once.
    """
    sweep = load_sweep(path)
    try:
        read_json(sweep.base)
    except ConfigError as error:
        said = [f"base: {error.source}: {line.replace(' with --config', '')}" for line in error.problems]
        raise ConfigError(said, path) from None
    points = expand(sweep, path)
    if (reason := directory_refusal(sweep.output_dir)) is not None:
        raise ConfigError([f"output_dir: {shown(str(sweep.output_dir))} given; {reason}; name another"], path)
    directory = SweepDirectory(sweep.output_dir / sweep.name)
    planned: list[PlannedPoint] = []
    lines: dict[str, list[str]] = {}
    for point in counted(points, "checking the points and their data", len(points)):
        try:
            config = _load(sweep, point, directory, "cuda" if devices else "cpu")
        except ConfigError as error:
            for line in error.problems:
                # Its keys are not given on a command line here.
                lines.setdefault(line.replace("--set ", ""), []).append(point.name)
            continue
        for line in _misfits(sweep, point, config, devices):
            lines.setdefault(line, []).append(point.name)
        planned.append(PlannedPoint(point, config, digest_of(config, point.ranks, sweep.evaluate_tasks)))
    if lines:
        raise ConfigError([f"{line} ({_shown_points(names, points)})" for line, names in lines.items()], path)
    return Plan(sweep, directory, planned)


def _load(sweep: SweepConfig, point: Point, directory: SweepDirectory, device_type: str) -> RunConfig:
    """The point's configuration; unless it says where, it is recorded in one store for all sweeps there."""
    own = {"run.name": point.name, "run.output_dir": str(directory.runs), "run.seed": point.seed}
    # One after another, so that a point's own section takes the place of keys in it that all points share.
    values = [*sweep.overrides.items(), *point.overrides.items(), *own.items()]
    config = load_config(
        sweep.base,
        [f"{key}={json.dumps(value)}" for key, value in values if key != RANKS_KEY],
        world_size=point.ranks,
        device_type=device_type,
    )
    tracking = config.tracking
    if (store := choose_store(sweep.output_dir, tracking.uri)).uri_from == "run.output_dir":
        tracking = tracking.model_copy(update={"uri": store.uri})
    config = config.model_copy(update={"schema_": None, "tracking": tracking})
    # Here, as a point that has an outcome is not run again unless it would compute something else.
    return config.with_auto_dtype(machine_dtype(device_type))


def _misfits(sweep: SweepConfig, point: Point, config: RunConfig, devices: Sequence[str]) -> Iterable[str]:
    if devices and point.ranks > len(devices):
        yield (
            f"launcher.ranks: {point.ranks} given; allowed: at most {len(devices)}, the devices there are; "
            "lower it, or leave the point out"
        )
    elif point.ranks > 1 and not all(name.isdecimal() for name in devices):
        named = next(name for name in devices if not name.isdecimal())
        yield (
            f"launcher.ranks: {point.ranks} given, and CUDA_VISIBLE_DEVICES calls a device {named}; allowed: "
            "1, as DeepSpeed's launcher takes numbers alone; name the devices by number there"
        )
    if sweep.evaluate_tasks and not config.evaluation.tasks:
        yield (
            "evaluate_tasks: true given, but evaluation.tasks is empty; list tasks there, or set it to false"
        )


def _shown_points(names: Sequence[str], points: Sequence[Point]) -> str:
    if len(names) == len(points) > 1:
        return "all points"
    shown = ", ".join(names[:SHOWN_POINTS])
    rest = len(names) - SHOWN_POINTS
    return (
        f"point {shown}" if len(names) == 1 else f"points {shown}" + (f" and {rest} more" if rest > 0 else "")
    )


def estimate_seconds(points: Sequence[PlannedPoint], rows: Mapping[str, Row]) -> float | None:
    """Wall time of `points` one after another, from points that are finished; None where none is.

    A point takes what those take that differ from it in the seed alone, or else those of its group, or else
    all of them.
    """
    finished = [row for row in rows.values() if row.outcome == "finished" and row.wall_seconds is not None]
    if not finished:
        return None
    total = 0.0
    for planned in points:
        point = planned.point
        alike = [row for row in finished if row.overrides == point.overrides and row.group == point.group]
        of_group = [row for row in finished if row.group == point.group]
        total += statistics.fmean(row.wall_seconds or 0.0 for row in alike or of_group or finished)
    return total


@dataclass(frozen=True)
class SweepState:
    """How far a plan is by what was recorded before.

    Attributes:
        rows: of every point of the plan, in its order.
        pending: points to run, in the plan's order.
        replaced: earlier rows of points that have changed or are not in the plan any more.
    """

    rows: Mapping[str, Row]
    pending: Sequence[PlannedPoint]
    replaced: Sequence[Row]


def sweep_state_of(plan: Plan, recorded: Mapping[str, Row], *, retry_failed: bool = False) -> SweepState:
    """Which points are to be run: those without an outcome of the same digest.

    Args:
        plan: what is to be there in the end.
        recorded: rows of points.jsonl.
        retry_failed: whether points that failed or ran out of memory are run again.
    """
    rows: dict[str, Row] = {}
    pending = []
    names = {planned.name for planned in plan.points}
    replaced = [row for name, row in recorded.items() if name not in names and row.outcome != "not_run"]
    for planned in plan.points:
        row = recorded.get(planned.name)
        if row is not None and row.digest == planned.digest:
            point = planned.point
            # These may be said in another way, for the same configuration.
            row = replace(row, group=point.group, overrides=dict(point.overrides), seed=point.seed)
            if row.outcome not in FINAL or (retry_failed and row.outcome != "finished"):
                pending.append(planned)
        else:
            if row is not None and row.outcome != "not_run":
                replaced.append(row)
            row = planned.row()
            pending.append(planned)
        rows[planned.name] = row
    return SweepState(rows, pending, replaced)
