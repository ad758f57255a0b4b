"""How tests are shared out among processes (`pytest --dist loadgroup --no-loadscope-reorder`)."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What tests prepare is not kept with what the user has; read by `datasets` when it is imported.
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-of-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

# Fixtures of several files that take a minute: the files that use one are run by one process.
SHARED_FIXTURES = ("results", "outcomes")
# Begun first, as no other tests are left to run beside them at the end.
LONGEST = (
    "distributed/test_pipeline.py",
    "distributed/test_resume.py",
    "launch/test_signals.py",
    "distributed/test_topologies.py",
    "launch/test_train.py",
    "faults/test_faults.py",
    "launch/test_bad_input.py",
    "sweep/test_execute.py",
    "test_trainers.py",
    "launch/test_lost_ranks.py",
    "launch/test_harness.py",
    "launch/test_evaluate.py",
    "models/test_any_decoder.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives every test the group of its file, or that of the fixture which its file shares with others."""
    groups: dict[Path, str] = {}
    for item in items:
        names = getattr(item, "fixturenames", ())
        shared = next((name for name in SHARED_FIXTURES if name in names), None)
        if shared or item.path not in groups:
            groups[item.path] = shared or str(item.path)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[item.path]))
    here = Path(__file__).parent
    place = {here / file: index for index, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuses to go on where every process would make every fixture, as pytest-xdist reads no groups."""
    if getattr(session.config.option, "loadgroup", False) and not all(
        "@" in item.nodeid for item in session.items
    ):
        raise pytest.UsageError("pytest-xdist has put no test into its group; install pytest < 9.2")
