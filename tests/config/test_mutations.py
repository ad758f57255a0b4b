"""Configurations with something wrong in them, drawn at random, are read or explained."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.loading import load_config
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.sweep.plan import plan_sweep

from .conftest import WORKING

CONFIGS = Path(__file__).parents[2] / "configs"
BASES = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json")) if path.stem != "schema"]
SWEEPS = [
    json.loads(path.read_text())
    for path in sorted((CONFIGS / "sweeps").glob("*.json"))
    if path.stem != "schema"
]
NUM_CONFIGS, NUM_SWEEPS = 2500, 150
SEED = 13
LONGEST_LINE = 1000

TEXTS = [
    "",
    " ",
    "~",
    "~/x",
    "~nobody-here/x",
    "/",
    ".",
    "..",
    "a/b/c",
    "/dev/null",
    "/dev/null/x",
    "/proc/self/mem",
    "x" * 300,
    "x" * 5000,
    "/".join(["x" * 200] * 30),
    "\0",
    "a\0b.jsonl",
    "\n",
    "line\nline",
    "\r\x1b[31m",
    "\ufeff",
    "\u202e",
    "\U0001f600" * 50,
    "ß\u0301\u0300",
    "[",
    "[!",
    "{",
    "{}",
    "{0}",
    "{a.b[c]!r:>{d}}",
    "**",
    "*" * 50 + "/x",
    "%s%n%20",
    "a?b#c",
    "null",
    "NaN",
    "1e999",
    "true",
    "-1",
    "q_proj",
    "bytes",
    "sqlite:///\0",
    "http://[",
]
NUMBERS: list[Any] = [0, -1, 1, 2, 63, 64, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**400)]
NUMBERS += [0.0, -0.0, 0.5, 1.5, -1e300, 1e300, 1e-300, 5e-324]
VALUES: list[Any] = [None, True, False, *NUMBERS, *TEXTS]
# What JSON has no word for, as files and command lines may have it all the same.
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 2000 + "]" * 2000, "{", ""]


def nested(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(5 if depth < 4 else 1)
    if kind == 1:
        return [nested(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 2:
        return {rng.choice(TEXTS): nested(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 3:
        return {
            key: nested(rng, depth + 1) for key in rng.sample(["path", "name", "model_type", "format"], 2)
        }
    if kind == 4 and depth == 0:
        deep: Any = rng.choice(VALUES)
        for _ in range(rng.choice([10, 60, 300])):
            deep = [deep] if rng.random() < 0.5 else {"x": deep}
        return deep
    return rng.choice(VALUES)


def holders(data: Any) -> list[Any]:
    """All objects and lists in `data` that hold something."""
    found = [data] if data else []
    for value in data.values() if isinstance(data, dict) else data:
        if isinstance(value, dict | list):
            found += holders(value)
    return found


def mutate(data: Any, rng: random.Random) -> None:
    """Changes one thing somewhere in `data`."""
    holder = rng.choice(holders(data) or [data])
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = rng.choice(keys) if keys else "x"
    kind = rng.randrange(7)
    if kind == 0 and keys:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict) and keys:
        holder[rng.choice([key[:-1], key.upper(), f"{key}s", rng.choice(TEXTS)])] = holder.pop(key)
    elif kind == 2 and isinstance(holder, dict):
        other = rng.choice(holders(data) or [data])
        holder[rng.choice(TEXTS)] = copy.deepcopy(other)
    elif kind == 3 and isinstance(holder, list):
        holder.extend(copy.deepcopy(holder) * rng.choice([1, 20]))
    elif kind == 4 and keys and isinstance(holder[key], str):
        place = rng.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:place] + rng.choice(TEXTS) + holder[key][place:]
    elif keys or isinstance(holder, dict):
        holder[key] = nested(rng) if kind == 5 else rng.choice(VALUES)


def overrides(data: Any, rng: random.Random) -> list[str]:
    """What may stand behind --set."""
    given = []
    for _ in range(rng.randrange(3)):
        section = rng.choice([*data, "x"])
        inside = data.get(section)
        key = rng.choice([*inside, "x"]) if isinstance(inside, dict) else rng.choice(TEXTS)
        value = rng.choice([*RAW, json.dumps(rng.choice(VALUES)), rng.choice(TEXTS)])
        given.append(rng.choice([f"{section}.{key}={value}", f"{section}={value}", f"{key}{value}", value]))
    return given


def text_of(data: Any, rng: random.Random) -> str:
    """`data` as a file, which now and then is damaged."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice([*RAW, *TEXTS]) + text[place + rng.randrange(3) :]
    return text


def judge(load: Callable[[], object], case: str) -> None:
    """Fails, showing the case, unless there is a result or lines that a person can read."""
    try:
        load()
        return
    except ConfigError as error:
        refused = error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}\n{case}") from error
    lines = str(refused).split("\n")
    assert refused.problems, case
    assert len(lines) == 1 + len(refused.problems), f"{lines}\n{case}"
    assert all(0 < len(line.strip()) <= LONGEST_LINE for line in lines), f"{lines}\n{case}"
    assert all(line.isprintable() for line in lines), f"{lines}\n{case}"


@pytest.mark.parametrize("part", range(5))
def test_a_mutated_configuration_is_read_or_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(part * NUM_CONFIGS // 5, (part + 1) * NUM_CONFIGS // 5):
        rng = random.Random(f"{SEED} {number}")
        data = copy.deepcopy(rng.choice([WORKING, *BASES]))
        for _ in range(rng.randrange(1, 5)):
            mutate(data, rng)
        text, given = text_of(data, rng), overrides(data, rng)
        (tmp_path / "run.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        world_size, device = rng.choice([1, 2, 3]), rng.choice(["cpu", "cuda", None])
        judge(
            lambda: load_config("run.json", given, world_size=world_size, device_type=device),  # noqa: B023
            f"seed {SEED} {number}, {world_size} ranks, {device}, overrides {given!r}, {text[:3000]!r}",
        )


def test_a_mutated_sweep_is_planned_or_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.json").write_text(json.dumps(WORKING))
    own = {
        "name": "own",
        "base": "base.json",
        "grid": {"adapter.rank": [2, 4], "method": {"a": {}, "b": {"adapter.method": "lora"}}},
        "list": [{"name": "c", "overrides": {"run.name": "x"}}],
        "exclude": [{"method": "a"}],
    }
    for number in range(NUM_SWEEPS):
        rng = random.Random(f"{SEED} {number}")
        data = copy.deepcopy(rng.choice([own, own, *SWEEPS]))
        if rng.random() < 0.9:
            data["base"] = "base.json"
        for _ in range(rng.randrange(1, 4)):
            mutate(data, rng)
        text = text_of(data, rng)
        (tmp_path / "sweep.json").write_text(text, encoding="utf-8", errors="surrogatepass")
        judge(lambda: plan_sweep("sweep.json"), f"seed {SEED} {number}, {text[:3000]!r}")
