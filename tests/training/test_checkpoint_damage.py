"""Damage to a checkpoint, by accident or on purpose: found before anything of it is used."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmlora_dist.errors import CheckpointError
from ssmlora_dist.training.checkpoints import (
    FILES,
    OPTIMIZER_FILE,
    STATE_FILE,
    newest_checkpoint,
    read_checkpoint,
)
from ssmlora_dist.training.manifest import MANIFEST_FILE, write_manifest

from .checkpoint_cases import checkpoint, contents, same, write

NUM_CORRUPTIONS = 200
SEED = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoints")


def corrupt(path: Path, generator: random.Random) -> str:
    """Damages one file of a checkpoint in one way, and says how."""
    file = generator.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    position = generator.randrange(len(content))
    how = generator.choice(["flip", "bit", "truncate", "delete", "insert", "zero", "swap", "append"])
    if how == "delete":
        file.unlink()
        return f"{file.name} deleted"
    if how == "flip":
        content[position] ^= generator.randrange(1, 256)
    elif how == "bit":
        content[position] ^= 1 << generator.randrange(8)
    elif how == "truncate":
        del content[position:]
    elif how == "insert":
        content.insert(position, generator.randrange(256))
    elif how == "append":
        content.append(generator.choice(b"\n \0"))
    elif how == "zero":
        # As a file system leaves blocks that it had not written.
        content[position:] = bytes(len(content) - position)
    else:
        other = generator.randrange(len(content))
        content[position], content[other] = content[other], content[position]
    changed = bytes(content) != file.read_bytes()
    file.write_bytes(content)
    return f"{file.name} {how} at {position}" if changed else corrupt(path, generator)


def test_random_corruptions_are_all_detected(path: Path, tmp_path: Path) -> None:
    whole = contents(path)
    undetected, messages, damaged_files = [], [], set()
    for number in range(NUM_CORRUPTIONS):
        print(f"seed {SEED}, corruption {number}")
        copy = tmp_path / "copy"
        shutil.copytree(path, copy)
        what = corrupt(copy, random.Random(SEED * NUM_CORRUPTIONS + number))
        assert contents(copy) != whole
        damaged_files.add(what.split()[0])
        try:
            read_checkpoint(copy)
            undetected.append(what)
        except CheckpointError as error:
            messages.append(str(error))
        shutil.rmtree(copy)
    assert undetected == []
    assert len(messages) == NUM_CORRUPTIONS
    # Place and remedy.
    assert all(message.startswith(str(copy)) and "; " in message for message in messages)
    assert damaged_files == {*FILES, MANIFEST_FILE}


def test_every_byte_of_the_manifest_counts(path: Path) -> None:
    manifest = path / MANIFEST_FILE
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        manifest.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    manifest.write_bytes(whole)
    assert same(read_checkpoint(path), checkpoint())


def sealed(path: Path) -> None:
    """Makes a manifest for what was tampered with, as one who knows the format would."""
    (path / MANIFEST_FILE).unlink()
    write_manifest(path)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "executed"))


PICKLES: dict[str, Callable[[Any, Path], Any]] = {
    "pickle": lambda bomb, file: file.write_bytes(pickle.dumps(bomb)),
    "torch": lambda bomb, file: torch.save({"state": bomb}, file),
    "torch_legacy": lambda bomb, file: torch.save(bomb, file, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, STATE_FILE, "adapter_model.safetensors", "ssmlora.json"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_under_a_known_name_is_refused_and_not_run(
    path: Path, tmp_path: Path, kind: str, name: str
) -> None:
    target = tmp_path / "executed"
    PICKLES[kind](Bomb(target), path / name)
    sealed(path)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_checkpoint(path)
    assert not target.exists()


def test_the_pickles_of_these_tests_are_real(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.read_text() == "executed"


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "rng.pkl", "data.pth", "state.ckpt"])
def test_a_pickle_beside_is_refused_and_not_run(path: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "executed"
    torch.save(Bomb(target), path / name)
    sealed(path)
    with pytest.raises(CheckpointError, match=rf"{name}: looks like a pickle.*runs code"):
        read_checkpoint(path)
    assert not target.exists()


def test_foreign_files_are_refused(path: Path) -> None:
    (path / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(CheckpointError, match=r"modeling\.py: does not belong into a checkpoint; remove it"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", [OPTIMIZER_FILE, MANIFEST_FILE])
def test_links_pipes_and_directories_are_refused(path: Path, tmp_path: Path, name: str) -> None:
    (path / name).rename(tmp_path / name)

    def refused() -> None:
        with pytest.raises(CheckpointError, match=f"{name}: a link or no file"):
            read_checkpoint(path)

    (path / name).symlink_to(tmp_path / name)
    refused()
    (path / name).unlink()
    os.mkfifo(path / name)  # reading it would wait for ever
    refused()
    (path / name).unlink()
    (path / name).mkdir()
    refused()


def state(**changes: Any) -> Callable[[Path], None]:
    """Tampers with fields of trainer_state.json; None takes one out."""

    def tamper(path: Path) -> None:
        content = json.loads((path / STATE_FILE).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not ...}
        (path / STATE_FILE).write_text(json.dumps(kept))

    return tamper


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def tamper(path: Path) -> None:
        loaded = {name: tensor.clone() for name, tensor in load_file(path / OPTIMIZER_FILE).items()}
        change(loaded)
        save_file(loaded, path / OPTIMIZER_FILE)

    return tamper


def header(length: int, content: str) -> bytes:
    return struct.pack("<Q", length) + content.encode()


TAMPERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not_an_object": (text(STATE_FILE, "[]"), "not a JSON object"),
    "a_number": (text(STATE_FILE, "1" * 5000), "not JSON"),
    "not_a_number": (text(STATE_FILE, '{"validation_loss": NaN}'), "NaN is not a number"),
    "nested": (text(STATE_FILE, "[" * 100_000), "not JSON"),
    "not_text": (text(STATE_FILE, b"\xff\x00"), "not JSON"),
    "field_missing": (state(step=...), "where step, .* belong"),
    "field_foreign": (state(rng="cos\nsystem\n"), "holds step, .*rng, where"),
    "step_text": (state(step="10"), 'step is "10"'),
    "step_fraction": (state(step=10.5), r"step is 10\.5"),
    "step_true": (state(step=True), "step is true"),
    "step_negative": (state(step=-1), "step is -1"),
    "loss_text": (state(validation_loss="nan"), "validation_loss is"),
    "progress_list": (state(progress=[]), r"progress is \[\]"),
    "fingerprint_null": (state(base_fingerprint=None), "base_fingerprint is null"),
    "config_changed": (state(config={"run": {}}), "config_sha256 is not that of config"),
    "long_value": (state(step="x" * 10_000), r'step is "x{56}\.\.\.;'),
    "settings_list": (text("ssmlora.json", "[]"), "ssmlora.json: not a JSON object"),
    "settings_version": (text("ssmlora.json", '{"format_version": 99}'), "format version 99"),
    "settings_wrong": (text("ssmlora.json", '{"format_version": 1, "adapter": []}'), "ssmlora.json: adapter"),
    "moment_foreign": (tensors(lambda t: t.update(exp_avg=torch.ones(1))), "holds exp_avg., of no parameter"),
    "moment_renamed": (tensors(lambda t: t.update({"exp_avg.x": torch.ones(1)})), "holds exp_avg.x, of no"),
    "header_too_long": (text(OPTIMIZER_FILE, header(2**62, "{}")), "not a safetensors file"),
    "header_no_json": (text(OPTIMIZER_FILE, header(8, "cos\nsyst")), "not a safetensors file"),
    "header_offsets": (
        text(OPTIMIZER_FILE, header(57, '{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,9999]}}')),
        "not a safetensors file",
    ),
    "empty": (text(OPTIMIZER_FILE, b""), "not a safetensors file"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_is_tampered_with_is_refused_in_words(path: Path, name: str) -> None:
    tamper, message = TAMPERED[name]
    tamper(path)
    sealed(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no_files": (lambda m: m.pop("files"), "is damaged"),
    "files_list": (lambda m: m.update(files=[]), "is damaged"),
    "entry_null": (lambda m: m["files"].update({OPTIMIZER_FILE: None}), "is damaged"),
    "size_text": (lambda m: m["files"][OPTIMIZER_FILE].update(size="9"), "is damaged"),
    "entry_more": (lambda m: m["files"][OPTIMIZER_FILE].update(url="x"), "is damaged"),
    "file_less": (lambda m: m["files"].pop(OPTIMIZER_FILE), "lists .*, where .*optimizer.* belong"),
    "file_more": (lambda m: m["files"].update({"../a": m["files"][STATE_FILE]}), r"lists \.\./a, "),
    "version": (lambda m: m.update(format_version=1), "format version 1, this release reads 2"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_says_something_else(path: Path, name: str) -> None:
    from ssmlora_dist.training.manifest import _text

    change, message = MANIFESTS[name]
    content = json.loads((path / MANIFEST_FILE).read_text())
    change(content)
    (path / MANIFEST_FILE).write_text(_text(content.get("format_version"), content.get("files")))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_a_manifest_that_would_fill_the_memory_is_not_read(path: Path) -> None:
    os.truncate(path / MANIFEST_FILE, 2**33)
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        read_checkpoint(path)


def test_a_file_that_cannot_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def broken(file: Path, *arguments: Any, **options: Any) -> Any:
        if file.name == OPTIMIZER_FILE:
            raise OSError(5, os.strerror(5))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(
        CheckpointError, match=r"optimizer.safetensors: cannot be read \(Input/output error\)"
    ):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        newest_checkpoint(path.parent, lambda message: None)
