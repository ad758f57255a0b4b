"""The sweep file: one frozen pydantic model, and the JSON schema of it beside `configs/sweeps/*.json`.

`python -m ssmlora_dist.sweep.schema` writes that schema.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from ssmlora_dist.config.loading import read_json
from ssmlora_dist.config.problems import dotted, key_path_of, nearest
from ssmlora_dist.config.schema import LARGEST_SEED, LONGEST_NAME, NonEmpty, Section, UserDirectory, UserPath
from ssmlora_dist.config.shown import shown
from ssmlora_dist.durable import write_text
from ssmlora_dist.errors import ConfigError

SCHEMA_PATH = Path(__file__).parents[2] / "configs" / "sweeps" / "schema.json"
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"

Overrides = dict[NonEmpty, Any]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]


class LauncherSection(Section):
    """How points are started."""

    ranks: int = Field(default=1, ge=1)
    """Processes of a point; the override `launcher.ranks` sets it for some points alone."""
    points_at_once: int | None = Field(default=None, ge=1)
    """Points side by side at most; null: on CUDA as many as devices allow, on the CPU one."""


class ListedPoint(Section):
    """A point beside those of the grid."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the point, and of its group."""
    overrides: Overrides = Field(default={})
    """Values by dotted key of the run configuration."""
    seeds: Seeds | None = None
    """Its seeds; null: those of the sweep."""


class SweepConfig(Section):
    """A sweep over run configurations: `python launch/sweep.py --config this.json`."""

    schema_: str | None = Field(default=None, alias="$schema")
    """Path of the JSON schema, for editors."""
    name: str = Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME)
    """Name of the sweep and of its directory: letters, digits, `_`, `-` and (not first) `.`."""
    output_dir: UserDirectory = Path("sweeps")
    """Directory that holds the sweep directories, relative to the working directory."""
    base: UserPath
    """Path of the run configuration that every point starts from, relative to the working directory."""
    overrides: Overrides = Field(default={})
    """Values by dotted key that all points share."""
    grid: dict[NonEmpty, tuple[Any, ...] | dict[NonEmpty, Overrides]] = Field(default={})
    """Axes, combined each with each: a dotted key with its values, or a name with named overrides."""
    list_: tuple[ListedPoint, ...] = Field(default=(), alias="list")
    """Points beside those of the grid."""
    exclude: tuple[Annotated[dict[NonEmpty, Any], Field(min_length=1)], ...] = ()
    """Combinations of the grid that are left out: those that have all values of one of these entries."""
    seeds: Seeds = (0,)
    """Seeds (`run.seed`), with each of which every point is run."""
    group_by: Annotated[tuple[NonEmpty, ...], Field(min_length=1)] | None = None
    """Axes whose values name a point's group, such as its method; null: all but those that set a length."""
    baseline: NonEmpty | None = None
    """Group that the others are compared with in the report."""
    launcher: LauncherSection = LauncherSection()
    """How points are started."""
    evaluate_tasks: bool = False
    """Answer the tasks in `evaluation.tasks` with every trained adapter, by launch/evaluate.py."""
    timeout_seconds: float | None = Field(default=None, gt=0)
    """Seconds after which a point is stopped and counts as failed; null: none."""


def load_sweep(path: str | Path) -> SweepConfig:
    """Reads a sweep file.

    Raises:
        ConfigError: with one line for every key that is unknown, missing or of the wrong kind.
    """
    data, lines = read_json(path)
    try:
        # As JSON text: there strict mode refuses "8" for a number and still takes a list for a tuple.
        sweep = SweepConfig.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found: dict[str, str] = {}
        for detail in error.errors(include_url=False):
            where = dotted(key_path_of(detail, data))
            found.setdefault(where, _line(where, detail))
        lines += found.values()
    if lines:
        raise ConfigError(lines, source=str(path))
    return sweep


def _line(where: str, error: ErrorDetails) -> str:
    """What is wrong at a dotted path, what is allowed and how to mend it."""
    section, _, key = where.rpartition(".")
    if error["type"] == "extra_forbidden":
        allowed = _keys(section)
        guess = nearest(key, allowed)
        remedy = f"did you mean {guess}?" if guess else "remove it"
        return (
            f"{where}: unknown key ({shown(error['input'])} given); allowed: {', '.join(allowed)}; {remedy}"
        )
    if error["type"] == "missing":
        return f'{where}: missing; add "{key}" {f"to {section}" if section else "at the top level"}'
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    wanted = error["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return f"{where}: {shown(error['input'])} given; allowed: {wanted}; write a value that is allowed"


def _keys(section: str) -> list[str]:
    head = section.partition(".")[0]
    models: dict[str, type[Section]] = {"launcher": LauncherSection, "list": ListedPoint}
    model = models.get(head, SweepConfig)
    return [field.alias or name for name, field in model.model_fields.items()]


def schema_text() -> str:
    """The content of `configs/sweeps/schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **SweepConfig.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    write_text(SCHEMA_PATH, schema_text())
    print(f"wrote {SCHEMA_PATH}")
