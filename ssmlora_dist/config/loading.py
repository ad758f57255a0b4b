"""Reading a run configuration: the file, the overrides of the command line, and all problems at once."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ssmlora_dist.config.problems import Doubtful, Problem, describe, dotted, nearest
from ssmlora_dist.config.rules import rule_problems
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.shown import shown
from ssmlora_dist.config.topology import topology_problems
from ssmlora_dist.errors import AdapterError, ConfigError
from ssmlora_dist.ops.registry import import_forms
from ssmlora_dist.precision import machine_dtype
from ssmlora_dist.ranks import read_launch_environment

# More of either is a slip, and more than what reads them can take.
DEEPEST, MOST_DIGITS = 50, 100
_TOO_DEEP = f"more than {DEEPEST} lists or objects inside each other; take some out"

# What stands in for a required field that is missing or wrong, so that the rest can still be judged.
_STAND_INS: dict[tuple[str, ...], Any] = {
    ("run",): {"name": "unnamed"},
    ("run", "name"): "unnamed",
    ("model",): {},
    ("training",): {},
    ("data",): {"train": {"format": "text"}},
    ("data", "train"): {"format": "text"},
    ("data", "train", "format"): "text",
    ("data", "validation", "format"): "text",
    ("data", "train", "task", "task"): "passkey",
    ("data", "validation", "task", "task"): "passkey",
}
# An optional section with required fields: with one of these wrong it is left out.
_LEFT_OUT_WHOLE = ("model", "rope_parameters")


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    device_type: str | None = None,
    check_files: bool = True,
    for_training: bool = True,
) -> RunConfig:
    """Reads, overrides and checks a run configuration.

    Args:
        path: the JSON file.
        overrides: `a.b=value` each; the value is JSON, or else taken as text.
        world_size: number of ranks; by default as many as were started.
        device_type: `cuda` or `cpu`, where the run will compute; None leaves the rules about it, and about a
            compute dtype that is "auto", unjudged.
        check_files: whether the files and directories that the configuration names must exist.
        for_training: whether a training is to be possible here; otherwise the files of its data may be
            missing, and ranks may be as many as there are.

    Returns:
        The configuration, with nothing left to find wrong that needs neither model nor data. A compute dtype
        "auto" is left: what it stands for, the ranks and the checkpoint that is continued decide.

    Raises:
        ConfigError: with one line for every problem found.
    """
    data, lines = read_json(path)
    lines += apply_overrides(data, overrides)
    _refuse_half_characters(data, str(path))
    lines += _import_forms(data.get("adapter"))
    config, doubtful, schema_lines = _validate(data)
    lines += schema_lines
    lines += rule_problems(config, doubtful, check_files=check_files, for_training=for_training)
    lines += topology_problems(
        config if device_type is None else config.with_auto_dtype(machine_dtype(device_type)),
        world_size=read_launch_environment().world_size if world_size is None else world_size,
        device_type=device_type,
        flash_attention_installed=importlib.util.find_spec("flash_attn") is not None,
        doubtful=doubtful,
        for_training=for_training,
    )
    if lines:
        raise ConfigError(lines, source=str(path))
    return config


def read_json(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The object in a JSON file, and a line for every key that it holds twice.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = nearest(path.name, [file.name for file in path.parent.glob("*.json")])
        guess = f"; did you mean {path.with_name(beside)}?" if beside else ""
        problem = f"no such file (working directory {Path.cwd()}); name an existing file with --config{guess}"
        raise ConfigError([problem], source=str(path)) from None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8 text; save the file as UTF-8"
        raise ConfigError([problem], source=str(path)) from None
    except OSError as error:
        problem = f"cannot be read ({error.strerror}); name a readable file with --config"
        raise ConfigError([problem], source=str(path)) from None
    repeated: list[tuple[dict[str, Any], str]] = []
    try:
        data = _parse(text, repeated)
    except json.JSONDecodeError as error:
        problem = (
            f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}; look for a missing or extra "
            "comma, quote or bracket there (JSON has neither comments nor trailing commas)"
        )
        raise ConfigError([problem], source=f"{path}:{error.lineno}:{error.colno}") from None
    except ValueError as error:
        raise ConfigError([f"not JSON: {error}"], source=str(path)) from None
    if not isinstance(data, dict):
        problem = f"{shown(data)} given; allowed: one JSON object with sections; put it into {{ }}"
        raise ConfigError([problem], source=str(path))
    return data, [_twice(data, holder, key) for holder, key in repeated]


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Writes each `a.b=value` into `data`; returns a line for every one that cannot be written."""
    lines = []
    for override in overrides:
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts) or len(parts) > DEEPEST:
            lines.append(
                f"--set {override}: not of the form section.key=value, such as training.max_steps=100"
            )
            continue
        try:
            value = _parse(text)
        except ValueError:
            value = text
        holder: Any = data
        for depth, part in enumerate(parts[:-1]):
            if holder.get(part) is None:
                holder[part] = {}
            holder = holder[part]
            if not isinstance(holder, dict):
                held = dotted(parts[: depth + 1])
                lines.append(
                    f"--set {override}: {held} is {shown(holder)}, which has no keys; "
                    f"set it whole: --set {held}=VALUE"
                )
                break
        else:
            holder[parts[-1]] = value
    return lines


def _import_forms(adapter: Any) -> list[str]:
    """Imports `adapter.form_module`, whose forms the section may name; a line if that fails."""
    module = adapter.get("form_module") if isinstance(adapter, dict) else None
    if not isinstance(module, str) or not module:
        return []
    try:
        import_forms(module)
    except AdapterError as error:
        # Nothing can be said of what names or sets its forms.
        for key in ("method", "every_layer_method", "form_settings"):
            adapter.pop(key, None)
        return [f"adapter.form_module: {error}"]
    return []


def _parse(text: str, repeated: list[tuple[dict[str, Any], str]] | None = None) -> Any:
    """JSON without the extensions NaN and Infinity; keys given twice are appended to `repeated`."""

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        collected: dict[str, Any] = {}
        for key, value in pairs:
            if key in collected and repeated is not None:
                repeated.append((collected, key))
            collected[key] = value
        return collected

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number that JSON has; write finite numbers")

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits; write at most {MOST_DIGITS}")
        return int(digits)

    try:
        value = json.loads(text, object_pairs_hook=collect, parse_constant=refuse, parse_int=whole)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for holder in level if isinstance(holder, dict | list) for inner in _values(holder)]
    if level:
        raise ValueError(_TOO_DEEP)
    return value


def _values(holder: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def _twice(data: Any, holder: dict[str, Any], key: str) -> str:
    where = dotted([*_find(data, holder, []), key])
    return f"{where}: given twice; allowed: once; remove one of them (the last was {shown(holder[key])})"


def _find(here: Any, holder: dict[str, Any], key_path: list[str | int]) -> list[str | int]:
    """The path from `here` to the object `holder`; empty where another key of the same name replaced it."""
    if here is holder:
        return key_path
    items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
    for key, value in items:
        if found := _find(value, holder, [*key_path, key]):
            return found
    return []


def _refuse_half_characters(data: dict[str, Any], source: str) -> None:
    """Raises for text with half of a surrogate pair, which no file or tokenizer takes."""
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        around = ascii(error.object[max(0, error.start - 20) : error.end])
        problem = f"not valid Unicode text near {around}; write whole characters, in UTF-8"
        raise ConfigError([problem], source=source) from None


def _validate(data: dict[str, Any]) -> tuple[RunConfig, Doubtful, list[str]]:
    """The configuration with every wrong part replaced by its default or a stand-in, and the lines."""
    data = copy.deepcopy(data)
    lines: list[str] = []
    doubtful: set[str] = set()
    first_pass = True
    while True:
        try:
            # As JSON text: there strict mode refuses "8" for a number and still takes a list for a tuple.
            config = RunConfig.model_validate_json(json.dumps(data), strict=True)
            return config, Doubtful(frozenset(doubtful)), lines
        except ValidationError as error:
            problems = describe(error.errors(include_url=False), data)
        for problem in problems:
            if first_pass or _still_holds(problem, doubtful):
                lines.append(problem.line)
        before = copy.deepcopy(data)
        for problem in problems:
            doubtful.update(problem.doubtful)
            _replace(data, problem)
        assert data != before, f"nothing stands in for what is wrong: {problems}"
        first_pass = False


def _still_holds(problem: Problem, doubtful: set[str]) -> bool:
    """Whether a check that ran only once other keys were replaced speaks of none of those.

    Checks over several fields of a section name the fields in backticks.
    """
    section = dotted(problem.key_path)
    return not any(f"`{field.removeprefix(f'{section}.')}`" in problem.line for field in doubtful)


def _replace(data: dict[str, Any], problem: Problem) -> None:
    """Takes what is wrong out of `data`, together with the list that it stands in."""
    holder: Any = data
    keys: list[str] = []
    for part in problem.key_path[:-1]:
        if not isinstance(holder.get(part), dict) or (*keys, part) == _LEFT_OUT_WHOLE:
            break
        holder = holder[part]
        keys.append(str(part))
    key = str(problem.key_path[len(keys)])
    holder.pop(key, None)
    if (*keys, key) in _STAND_INS:
        holder[key] = copy.deepcopy(_STAND_INS[*keys, key])
