"""All command lines of `cases.py`, run once for all tests: in one process, and a few in their own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from .cases import BAD, DRY_RUN, DRY_RUN_COUNTS, GENERATE, HELP, MENDED, TAKEN, UNFIT, arguments_of
from .materials import CONFIG_FILE, prepare
from .processes import (
    GENERATE_SCRIPT,
    ON_CPU,
    TRAIN_SCRIPT,
    Finished,
    finish,
    train_command,
    without_progress,
)

SCRIPTS_WORKER = "tests.launch.scripts_worker"

# A mistake in the configuration, in the data and in the model. The fourth waits: for 20 seconds its library
# tries to reach a hub that is away.
REAL = ("unknown-key", "line-corrupt", "model-pickled", "data-on-no-hub")
ONLY_REAL = "data-on-no-hub"


@dataclass(frozen=True)
class Outcomes:
    """What the command lines left, each group by the names of its cases."""

    directory: Path
    refused: dict[str, Finished]
    real: dict[str, Finished]
    mended: Finished
    unfit: dict[str, Finished]
    generated: Finished
    dry_run: Finished
    dry_run_counts: Finished
    help: Finished
    new_entries: frozenset[str]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Runs everything in one directory."""
    directory, aside = tmp_path_factory.mktemp("scripts"), tmp_path_factory.mktemp("aside")
    prepare(directory)
    before = _entries(directory)
    cases = {name: case for name, case in (BAD | TAKEN).items() if name != ONLY_REAL}
    train, generate = str(TRAIN_SCRIPT), str(GENERATE_SCRIPT)
    commands = [
        *([train, *arguments_of(name, case)] for name, case in cases.items()),
        [train, "--config", CONFIG_FILE, "--set", f"run.name={MENDED}"],
        *([generate, *case.arguments] for case in UNFIT.values()),
        [generate, *GENERATE],
        [train, *DRY_RUN],
        [train, *DRY_RUN_COUNTS],
        [train, *HELP],
    ]
    commands_file, results_file = aside / "commands.json", aside / "results.json"
    commands_file.write_text(json.dumps(commands))
    worker, *real = finish(
        [
            ["-m", SCRIPTS_WORKER, str(commands_file), str(results_file)],
            *(train_command(*arguments_of(name, BAD[name])) for name in REAL),
        ],
        directory,
        [ON_CPU] * (1 + len(REAL)),
    )
    assert worker.exit_code == 0, worker.stderr
    results = iter(
        Finished(exit_code, stdout, without_progress(stderr))
        for exit_code, stdout, stderr in json.loads(results_file.read_text())
    )
    return Outcomes(
        directory=directory,
        refused={name: next(results) for name in cases} | {ONLY_REAL: real[REAL.index(ONLY_REAL)]},
        real=dict(zip(REAL, real, strict=True)),
        mended=next(results),
        unfit={name: next(results) for name in UNFIT},
        generated=next(results),
        dry_run=next(results),
        dry_run_counts=next(results),
        help=next(results),
        new_entries=frozenset(_entries(directory) - before),
    )


def _entries(directory: Path) -> set[str]:
    """Every file and directory, relative, but for the hub's cache."""
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if not path.is_relative_to(directory / "hub")
    }
