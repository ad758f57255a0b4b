"""Which checkpoint `--resume` finds, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import CheckpointError, ConfigError
from ssmlora_dist.tracking import RunDirectory
from ssmlora_dist.training import resume_point as module
from ssmlora_dist.training.checkpoints import LATEST_FILE, OPTIMIZER_FILE
from ssmlora_dist.training.resume_point import (
    AUTO,
    NEVER,
    ResumePoint,
    base_of,
    check_settings,
    find_resume_point,
    settle_places,
)

from .checkpoint_cases import checkpoint, contents, same, write

FINGERPRINT = "f00d" * 16


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run that has saved twice and ended."""
    run = RunDirectory.create(tmp_path / "runs" / "run")
    run.release()
    for step in (10, 20):
        write(run.checkpoints, step)
    return RunDirectory(run.path)


def no_warning(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def find(resume: str | Path, directory: RunDirectory, warnings: list[str] | None = None) -> ResumePoint:
    return find_resume_point(str(resume), directory, no_warning if warnings is None else warnings.append)


def is_locked(run: RunDirectory) -> bool:
    """Whether another process could not continue it now."""
    other = RunDirectory(run.path)
    try:
        other.claim(resume=True)
    except CheckpointError:
        return True
    other.release()
    return False


def test_one_that_only_looks_claims_and_makes_nothing(directory: RunDirectory, tmp_path: Path) -> None:
    leftover = directory.checkpoints / ".step-00000030.partial"
    leftover.mkdir()
    found = find_resume_point(AUTO, directory, no_warning, claim=False)
    assert (found.step, found.in_place) == (20, True)
    assert not is_locked(directory)
    assert leftover.exists()
    with pytest.raises(CheckpointError, match="holds a run already"):
        find_resume_point(NEVER, directory, no_warning, claim=False)
    elsewhere = RunDirectory(tmp_path / "nowhere" / "run")
    assert find_resume_point(AUTO, elsewhere, no_warning, claim=False) == ResumePoint()
    assert not elsewhere.path.parent.exists()


def test_one_that_only_looks_says_that_a_place_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for place in ("run", "new/deep/run"):
        with pytest.raises(CheckpointError, match=f"{place}: cannot be written: no permission to write"):
            find_resume_point(NEVER, RunDirectory(tmp_path / place), no_warning, claim=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", [NEVER, AUTO])
def test_a_new_run_begins_at_the_start_and_leaves_its_claim_for_later(tmp_path: Path, resume: str) -> None:
    found = find(resume, RunDirectory(tmp_path / "new"))
    assert found == ResumePoint(None, None, in_place=False)
    assert found.step == 0
    assert not (tmp_path / "new").exists()


def test_never_refuses_a_directory_that_is_taken(directory: RunDirectory) -> None:
    before = contents(directory.path)
    with pytest.raises(CheckpointError, match=r"holds a run already.*--resume"):
        find(NEVER, directory)
    assert contents(directory.path) == before


def test_auto_takes_the_newest_and_claims_the_directory(directory: RunDirectory) -> None:
    found = find(AUTO, directory)
    assert found.checkpoint is not None
    assert same(found.checkpoint, checkpoint(20))
    assert (found.path, found.in_place, found.step) == (directory.checkpoints / "step-00000020", True, 20)
    assert is_locked(directory)


def test_auto_tidies_up_after_a_kill(directory: RunDirectory) -> None:
    (directory.checkpoints / ".step-00000030.ab12.partial").mkdir()
    directory.adapter.mkdir()
    for place in (directory.path / ".summary.json.ab12.partial", directory.adapter / ".a.ab12.partial"):
        place.write_text("half")
    with directory.metrics_file.open("a") as file:
        file.write('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert find(AUTO, directory).step == 20
    assert list(directory.path.rglob("*.partial")) == []
    assert directory.read_metrics() == [{"step": 1, "loss": 2.0}]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(directory: RunDirectory) -> None:
    os.truncate(directory.checkpoints / "step-00000020" / OPTIMIZER_FILE, 100)
    warnings: list[str] = []
    assert find(AUTO, directory, warnings).step == 10
    assert len(warnings) == 1
    assert "step-00000020" in warnings[0]
    assert warnings[0].endswith("step-00000010 is used in its place")


@pytest.mark.parametrize("resume", [AUTO, "the run"])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    directory: RunDirectory, resume: str
) -> None:
    for path in directory.checkpoints.glob("step-*"):
        (path / OPTIMIZER_FILE).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be used; restore one"):
        find(resume if resume == AUTO else directory.path, directory)


def test_nor_one_whose_checkpoints_were_deleted(directory: RunDirectory) -> None:
    for path in directory.checkpoints.glob("step-*"):
        path.rename(directory.path / path.name)
    with pytest.raises(CheckpointError, match=f"{LATEST_FILE}: names step-00000020, which is gone"):
        find(AUTO, directory)


def test_a_run_without_a_checkpoint_yet_begins_anew_and_says_so(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "run").release()
    directory, warnings = RunDirectory(tmp_path / "run"), list[str]()
    assert find(AUTO, directory, warnings) == ResumePoint(None, None, in_place=True)
    assert warnings == [f"{tmp_path / 'run'}: its run had saved no checkpoint yet: it begins anew"]
    directory.release()
    # Asked for by name, it was meant to have one.
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint; name another one, or use never"):
        find(tmp_path / "run", RunDirectory(tmp_path / "run"))


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000020"])
@pytest.mark.parametrize("own", [True, False])
def test_a_directory_by_name(tmp_path: Path, directory: RunDirectory, place: str, own: bool) -> None:
    """The run's own or another's; the run, its checkpoints, or one of them."""
    target = directory if own else RunDirectory(tmp_path / "runs" / "other")
    found = find(directory.path / place, target)
    assert (found.path, found.step, found.in_place) == (directory.checkpoints / "step-00000020", 20, own)
    assert is_locked(directory) == own
    assert not (tmp_path / "runs" / "other").exists()


def test_an_older_checkpoint_by_name(directory: RunDirectory) -> None:
    found = find(directory.checkpoints / "step-00000010", directory)
    assert (found.step, found.in_place) == (10, True)


def test_another_runs_checkpoint_does_not_open_a_directory_that_is_taken(
    tmp_path: Path, directory: RunDirectory
) -> None:
    RunDirectory.create(tmp_path / "runs" / "other").release()
    with pytest.raises(CheckpointError, match="other: holds a run already"):
        find(directory.path, RunDirectory(tmp_path / "runs" / "other"))


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--resume .*gone: no such directory; name a run"):
        find(tmp_path / "gone", RunDirectory(tmp_path / "run"))


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("", "notes.txt", "data.bin"):
        (notes / (name or "inside")).mkdir()
        # Nothing in it is told to be removed.
        with pytest.raises(CheckpointError) as caught:
            find(notes, RunDirectory(tmp_path / "run"))
        assert str(caught.value) == f"{notes}: is no checkpoint; name a run or one of its checkpoints"


def test_a_run_that_is_in_use(directory: RunDirectory) -> None:
    running = RunDirectory.create(directory.path, resume=True)
    with pytest.raises(CheckpointError, match="another run is using it"):
        find(AUTO, directory)
    running.release()
    assert find(AUTO, directory).step == 20


def resume_point(tmp_path: Path, config: RunConfig) -> ResumePoint:
    saved = checkpoint(config=config.model_dump(mode="json", by_alias=True), base_fingerprint=FINGERPRINT)
    return ResumePoint(saved, tmp_path / "step-00000010", in_place=True)


def run_config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"name": "run"},
            "model": {"path": "org/base"},
            "data": {"train": {"format": "task", "task": {"task": "passkey"}}},
            "training": {"max_steps": 100},
            **sections,
        }
    )


def test_the_same_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_fingerprint", lambda config: FINGERPRINT)
    check_settings(ResumePoint(), run_config())
    assert base_of(run_config(), ResumePoint()) == FINGERPRINT
    longer = run_config(training={"max_steps": 200}, parallel={"zero_stage": 3})
    check_settings(resume_point(tmp_path, run_config()), longer)
    assert base_of(longer, resume_point(tmp_path, run_config())) == FINGERPRINT


def test_another_base_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build_fingerprint", lambda config: "beef" * 16)
    with pytest.raises(
        CheckpointError, match=rf"was trained on another base model \(fingerprint {FINGERPRINT}\)"
    ):
        base_of(run_config(), resume_point(tmp_path, run_config()))


def test_forbidden_changes_are_all_named_with_both_values(tmp_path: Path) -> None:
    changed = run_config(run={"name": "run", "seed": 7}, adapter={"rank": 4})
    with pytest.raises(ConfigError) as caught:
        check_settings(resume_point(tmp_path, run_config()), changed)
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"--resume {tmp_path / 'step-00000010'}: 2 problems"
    assert lines[0].startswith("  run.seed: 7 given, 0 in the checkpoint; ")
    assert lines[1].startswith("  adapter.rank: 4 given, 8 in the checkpoint; ")


def test_places_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    probe = run_config(adapter={"placement": "probe", "probe_batches": 2})
    assert settle_places(ResumePoint(), probe) is probe
    probed = probe.with_places(("0.q_proj", "2.up_proj"))
    point = resume_point(tmp_path, probed)
    assert settle_places(point, probe) == probed
    named = run_config(adapter={"places": ["2.up_proj", "0.q_proj"]})
    assert settle_places(point, named) is named
    other = run_config(adapter={"placement": "probe", "rank": 4})
    with pytest.raises(ConfigError, match=r"adapter\.rank: 4 given"):
        check_settings(point, settle_places(point, other))


def test_a_run_that_was_not_probed_is_not_probed_later(tmp_path: Path) -> None:
    probe = run_config(adapter={"placement": "probe", "probe_parameters": 999})
    point = resume_point(tmp_path, run_config())
    settled = settle_places(point, probe)
    assert settled == run_config()
    check_settings(point, settled)
