"""What decides the results of a point, as a short text that is another one as soon as any of it is."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.data.sources import find_files
from ssmlora_dist.errors import DataError

# Files up to this size count with every byte, larger ones with samples spread over them.
WHOLE_BYTES = 64 * 2**20
NUM_SAMPLES = 64
SAMPLE_BYTES = 2**20
_FILE_KEYS = ("path", "background")


def digest_of(config: RunConfig, ranks: int, evaluates_tasks: bool) -> str:
    """See `PlannedPoint.digest`.

    The contents of data files belong to it. Where a run lies or is recorded, what is kept of it and how long
    its ranks are patient decide nothing; a backbone counts by its name alone.
    """
    settings = config.model_dump(mode="json", exclude={"schema_", "tracking", "checkpoint"})
    settings["run"] = {"seed": config.run.seed}
    del settings["parallel"]["timeout_seconds"]
    settings["data"] = {
        key: _with_contents(value) if isinstance(value, dict) else value
        for key, value in settings["data"].items()
    }
    evaluation = settings["evaluation"]
    tasks = {
        "tasks": [_with_contents(task) for task in evaluation.pop("tasks")],
        "max_batch_tokens": evaluation.pop("max_batch_tokens"),
    }
    if config.evaluation.tasks_every_steps is not None:
        evaluation |= tasks
    digest = _hash({"config": settings, "ranks": ranks})
    return f"{digest}+{_hash(tasks)}" if evaluates_tasks else digest


def _with_contents(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section that may name files, with what is in them."""
    contents = [
        _content_of(file) for key in _FILE_KEYS for name in _each(section.get(key)) for file in _files(name)
    ]
    return {**section, "contents": contents} if contents else dict(section)


def _each(names: str | Sequence[str] | None) -> Sequence[str]:
    return [names] if isinstance(names, str) else names or []


def _files(name: str) -> Iterator[Path]:
    try:
        yield from find_files([name])
    except DataError:
        # Of a suffix that only its task takes; whatever else is wrong has been said before.
        yield Path(name)


def _content_of(file: Path) -> str:
    try:
        status = file.stat()
        return _content(file.resolve(), status.st_size, status.st_mtime_ns)
    except OSError as error:
        # The point itself will say so.
        return str(error.strerror)


@functools.lru_cache(maxsize=4096)
def _content(file: Path, size: int, changed_ns: int) -> str:
    """Of a file of that size which was changed then: the points of a sweep share theirs."""
    content = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        if size <= WHOLE_BYTES:
            while block := opened.read(SAMPLE_BYTES):
                content.update(block)
        else:
            for number in range(NUM_SAMPLES):
                opened.seek((size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
                content.update(opened.read(SAMPLE_BYTES))
    return content.hexdigest()[:16]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
