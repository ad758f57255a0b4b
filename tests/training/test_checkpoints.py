"""Checkpoint directories: what is written is read bitwise, and which of several is used."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ssmlora_dist import AdapterConfig, add_adapters, load_adapter
from ssmlora_dist.adapters.files import read_adapter
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.errors import CheckpointError
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.training.checkpoints import (
    LATEST_FILE,
    OPTIMIZER_FILE,
    complete_checkpoints,
    extract_adapter,
    newest_checkpoint,
    prune,
    read_checkpoint,
    remove_leftovers,
    write_checkpoint,
)
from tests.tiny import QV_AND_MLP, adapted_model, tiny_model

from .checkpoint_cases import BASE, checkpoint, contents, same, tensors, write


def names(directory: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(directory)]


def no_warning(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def test_what_is_written_is_read_bitwise(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints")
    assert path == tmp_path / "checkpoints" / "step-00000010"
    assert same(read_checkpoint(path), checkpoint())
    assert (path.parent / LATEST_FILE).read_text() == "step-00000010\n"
    assert {entry.name for entry in path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ssmlora.json",
        "optimizer.safetensors",
        "trainer_state.json",
        "manifest.json",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"moments": {}},
        {"moments": {"state1": {name: torch.ones(3, dtype=torch.uint8) for name in tensors(10)}}},
        {"validation_loss": 0.1},
        {"parameters": {name: tensor.double() for name, tensor in tensors(10).items()}},
        {"parameters": {name: tensor.T.contiguous().T for name, tensor in tensors(10).items()}},
        {"progress": {}},
        {"progress": {"deep": {"list": [1, "a", None, True, 1e-300], "text": "ä\u2028"}}},
    ],
    ids=["no_moments", "bytes", "loss", "float64", "strided", "no_progress", "progress"],
)
def test_so_is_everything_that_a_run_may_hand_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert same(read_checkpoint(write(tmp_path, **changes)), checkpoint(**changes))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_none(tmp_path: Path, loss: float) -> None:
    assert read_checkpoint(write(tmp_path, validation_loss=loss)).validation_loss is None


def test_it_is_an_adapter_directory(tmp_path: Path) -> None:
    model = adapted_model()
    parameters = {name: p.detach() for name, p in adapter_parameters(model).items()}
    path = write_checkpoint(tmp_path, checkpoint(parameters=parameters, moments={}), QV_AND_MLP, BASE)
    loaded = adapter_parameters(load_adapter(tiny_model(), path))
    assert all(torch.equal(loaded[name], parameters[name]) for name in parameters)
    assert read_adapter(path, "", ()).base == BASE


def test_its_size_is_that_of_parameters_and_moments(tmp_path: Path) -> None:
    """Of Llama-2-7B's adapter with 15.8 million parameters."""
    config = AdapterConfig(rank=8, every_layer=("o_proj", "gate_proj", "up_proj", "down_proj"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES["llama2-7b"]))
    shapes = {name: p.shape for name, p in adapter_parameters(add_adapters(model, config)).items()}
    large = {name: torch.ones(shape) for name, shape in shapes.items()}
    moments = {kind: {name: t + 1 for name, t in large.items()} for kind in ("exp_avg", "exp_avg_sq")}
    whole = checkpoint(parameters=large, moments=moments)
    path = write_checkpoint(tmp_path, whole, config, BASE)
    expected = 3 * 4 * 15_798_272
    assert whole.num_bytes == expected
    assert sum(entry.stat().st_size for entry in path.iterdir()) == pytest.approx(expected, rel=0.01)


def test_files_may_be_read_by_whom_the_others_may_be(tmp_path: Path) -> None:
    modes = {path.stat().st_mode for path in write(tmp_path).iterdir()}
    assert len(modes) == 1


def test_newest_first(tmp_path: Path) -> None:
    assert names(tmp_path / "nowhere") == []
    for step in (9, 100_000_000, 10):
        write(tmp_path, step)
    for other in ("step-12", "step-00000011.old", ".step-00000012.partial", "steps"):
        (tmp_path / other).mkdir()
    assert names(tmp_path) == ["step-100000000", "step-00000010", "step-00000009"]


def test_a_step_that_is_there_already_gets_a_second_directory(tmp_path: Path) -> None:
    """So that the first is there until the second is."""
    first = write(tmp_path, 10)
    before = contents(first)
    for _ in range(10):
        last = write(tmp_path, 10, validation_loss=1.0)
    assert last.name == "step-00000010-11"
    assert names(tmp_path)[:2] == ["step-00000010-11", "step-00000010-10"]
    assert contents(first) == before
    assert (tmp_path / LATEST_FILE).read_text() == "step-00000010-11\n"
    path, found = newest_checkpoint(tmp_path, no_warning) or pytest.fail("found none")
    assert (path, found.validation_loss) == (last, 1.0)


def test_none_where_there_has_never_been_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "checkpoints", no_warning) is None
    (tmp_path / ".step-00000010.1234.partial").mkdir()
    assert newest_checkpoint(tmp_path, no_warning) is None


def test_damaged_ones_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    paths = {step: write(tmp_path, step) for step in (10, 20, 30)}
    (paths[30] / OPTIMIZER_FILE).unlink()
    os.truncate(paths[20] / "adapter_model.safetensors", 100)
    warnings: list[str] = []
    path, found = newest_checkpoint(tmp_path, warnings.append) or pytest.fail("found none")
    assert path == paths[10]
    assert same(found, checkpoint(10))
    assert [
        warning.startswith(f"{tmp_path}/step-000000{n}")
        for warning, n in zip(warnings, (30, 20), strict=True)
    ]
    assert "holds no optimizer.safetensors" in warnings[0]
    assert "has 100 bytes" in warnings[1]
    assert all(warning.endswith(". step-00000010 is used in its place") for warning in warnings)


def test_all_damaged_is_an_error_and_no_start_from_scratch(tmp_path: Path) -> None:
    for step in (10, 20):
        (write(tmp_path, step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be used; restore one") as caught:
        newest_checkpoint(tmp_path, no_warning)
    assert str(caught.value).count("holds no manifest.json") == 2
    assert caught.value.exit_code == 2


def test_a_latest_that_is_gone_is_told_of(tmp_path: Path) -> None:
    paths = {step: write(tmp_path, step) for step in (10, 20)}
    shutil.rmtree(paths[20])
    warnings: list[str] = []
    path, _ = newest_checkpoint(tmp_path, warnings.append) or pytest.fail("found none")
    assert path == paths[10]
    [warning] = warnings
    assert "latest: names step-00000020, which is gone. step-00000010 is used in its place" in warning
    shutil.rmtree(paths[10])
    with pytest.raises(CheckpointError, match="names step-00000020, which is gone"):
        newest_checkpoint(tmp_path, no_warning)


@pytest.mark.parametrize("content", [b"", b"step-00000005\n", b"\xff\xfe", b"../../etc"])
def test_a_latest_that_says_nothing_new_changes_nothing(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path)
    (tmp_path / LATEST_FILE).write_bytes(content)
    assert newest_checkpoint(tmp_path, no_warning)[0] == path  # type: ignore[index]


@pytest.mark.parametrize(
    ("keep", "keep_best", "left"),
    [
        (1, False, [50]),
        (2, False, [50, 40]),
        (9, False, [50, 40, 30, 20, 10]),
        (1, True, [50, 20]),
        (4, True, [50, 40, 30, 20]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep: int, keep_best: bool, left: list[int]
) -> None:
    losses = {10: 0.5, 20: 0.25, 30: None, 40: 0.3, 50: None}
    paths = {step: write(tmp_path, step, validation_loss=loss) for step, loss in losses.items()}
    prune(tmp_path, paths[50], keep=keep, keep_best=keep_best)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]
    assert {entry.name for entry in tmp_path.iterdir()} == {LATEST_FILE, *names(tmp_path)}


def test_of_equally_good_ones_the_newest_is_the_best(tmp_path: Path) -> None:
    paths = [write(tmp_path, step, validation_loss=loss) for step, loss in ((1, 1.0), (2, 1.0), (3, 2.0))]
    prune(tmp_path, paths[-1], keep=1, keep_best=True)
    assert names(tmp_path) == ["step-00000003", "step-00000002"]


def test_what_a_run_went_back_behind_does_not_push_out_what_it_writes(tmp_path: Path) -> None:
    """The one of step 30 was damaged: it counts neither as newest nor as best."""
    for step in (10, 20, 30):
        write(tmp_path, step, validation_loss=1.0 / step)
    newest = write(tmp_path, 20, validation_loss=None)
    prune(tmp_path, newest, keep=1, keep_best=True)
    assert names(tmp_path) == ["step-00000020-2", "step-00000010"]
    assert newest_checkpoint(tmp_path, no_warning)[0] == newest  # type: ignore[index]


def test_a_damaged_one_is_never_the_best(tmp_path: Path) -> None:
    paths = [write(tmp_path, step, validation_loss=0.1 * step) for step in (1, 2, 3)]
    (paths[0] / "trainer_state.json").write_text("{")
    prune(tmp_path, paths[2], keep=1, keep_best=True)
    assert names(tmp_path) == ["step-00000003", "step-00000002"]


def test_links_are_deleted_and_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    directory = tmp_path / "checkpoints"
    newest = write(directory, 10)
    (directory / "step-00000005").symlink_to(mine)
    (directory / ".step-00000006.0.partial").symlink_to(mine)
    with pytest.raises(CheckpointError, match="is no directory of its own"):
        read_checkpoint(directory / "step-00000005")
    prune(directory, newest, keep=1, keep_best=False)
    remove_leftovers(directory)
    assert {entry.name for entry in directory.iterdir()} == {LATEST_FILE, newest.name}
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_leftovers_of_kills_go_and_nothing_else_does(tmp_path: Path) -> None:
    remove_leftovers(tmp_path / "nowhere")
    path = write(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / ".step-1.partial").write_text("mine")
    for name in (".step-00000020.ab12.partial", ".step-00000005-2.cd34.removed"):
        shutil.copytree(path, tmp_path / name)
    (tmp_path / ".latest.12345678.partial").write_text("step-0")
    remove_leftovers(tmp_path)
    assert contents(tmp_path) == before | {"notes/.step-1.partial": b"mine"}


def test_without_enough_space_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    before = contents(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**19, 2**19))
    with pytest.raises(CheckpointError, match=r"needs 1\.0 MiB, 0\.5 MiB are free; free some, lower"):
        write(tmp_path, 20)
    assert contents(tmp_path) == before


def test_a_checkpoints_place_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="a part of this path is a file"):
        write(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="cannot be read"):
        complete_checkpoints(tmp_path / "checkpoints")


def test_a_read_only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    before = contents(tmp_path)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(
        CheckpointError, match=r"the file system is read-only; choose another run\.output_dir"
    ):
        write(tmp_path, 20)
    assert contents(tmp_path) == before


def test_the_adapter_comes_out_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints")
    extract_adapter(path, tmp_path / "deep" / "adapter")
    out = contents(tmp_path / "deep")
    assert {Path(name).name for name in out} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ssmlora.json",
    }
    assert all(content == (path / Path(name).name).read_bytes() for name, content in out.items())
    saved = read_adapter(tmp_path / "deep" / "adapter", "", ())
    assert all(torch.equal(saved.tensors[name], tensor) for name, tensor in tensors(10).items())


def test_no_adapter_comes_out_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints")
    (path / OPTIMIZER_FILE).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: has 0 bytes"):
        extract_adapter(path, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        extract_adapter(tmp_path / "nowhere", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(
        CheckpointError, match="exists, and nothing in it is overwritten; choose another --out"
    ):
        extract_adapter(path, tmp_path / "adapter")
