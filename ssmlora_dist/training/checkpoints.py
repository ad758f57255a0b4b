"""Checkpoints: one directory each of what is trained and where training stands, of no topology.

    step-00000010/
      adapter_config.json, adapter_model.safetensors, ssmlora.json     an adapter directory, loadable as such
      optimizer.safetensors                                            keys `exp_avg.<parameter name>`, ...
      trainer_state.json                                               step, progress, configuration
      manifest.json                                                    sizes and checksums of the others
    latest                                                             the name of the last one written

A directory gets its name when everything in it is on the disk, and loses it before anything in it is deleted:
under such a name there is a whole checkpoint or, after an accident of the disk, one that its manifest gives
away. Only JSON and safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.files import PEFT_FILE, SETTINGS_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from ssmlora_dist.durable import explained, sync, write_tensors, write_text
from ssmlora_dist.errors import AdapterError, CheckpointError
from ssmlora_dist.training.manifest import USE_ANOTHER, read_object, verify, write_manifest

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
LATEST_FILE = "latest"
ADAPTER_FILES = (PEFT_FILE, WEIGHTS_FILE, SETTINGS_FILE)
FILES = (*ADAPTER_FILES, OPTIMIZER_FILE, STATE_FILE)
# Beside the tensors: the JSON files, and blocks that a file system fills in part.
SPARE_BYTES = 2**20
# The second number tells apart those of one step: a run that goes back writes steps that are there already.
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_HIDDEN = re.compile(r"\.(step-|latest\.).*\.(partial|removed)")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, on any topology.

    Attributes:
        step: optimiser steps done.
        parameters: what is trained, by full name.
        moments: the optimiser's tensors by kind and parameter name: `{"exp_avg": {name: tensor}}`.
        progress: whatever else the run hands over, in JSON types.
        config: the resolved configuration, in JSON types.
        contents: what the run works on, as of `training.contents`, in JSON types.
        base_fingerprint: of the frozen backbone.
        validation_loss: of these parameters, if they were evaluated.
    """

    step: int
    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    progress: dict[str, Any]
    config: dict[str, Any]
    contents: dict[str, Any]
    base_fingerprint: str
    validation_loss: float | None = None

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        tensors = [*self.parameters.values(), *_keyed(self.moments).values()]
        return sum(tensor.nbytes for tensor in tensors)


def write_checkpoint(
    directory: Path, checkpoint: Checkpoint, adapter_config: AdapterConfig, base: Mapping[str, Any]
) -> Path:
    """Writes a checkpoint into `directory` and makes it the latest; returns its own directory.

    Whatever happens on the way, the checkpoints before it and `latest` stay as they were.

    Args:
        directory: of a run's checkpoints; made if it does not exist.
        checkpoint: its tensors must not change meanwhile.
        adapter_config: of the adapters.
        base: how to load the base model, as for `write_adapter`.

    Raises:
        CheckpointError: there is not enough space, or the place cannot be written.
    """
    with explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _check_space(directory, checkpoint.num_bytes + SPARE_BYTES)
        path = _unused(directory, checkpoint.step)
        beside = _hidden(path, "partial")
        try:
            beside.mkdir()
            write_adapter(
                beside,
                adapter_config,
                checkpoint.parameters,
                base=base,
                base_fingerprint=checkpoint.base_fingerprint,
            )
            write_tensors(beside / OPTIMIZER_FILE, _keyed(checkpoint.moments))
            write_text(beside / STATE_FILE, json.dumps(_state(checkpoint), indent=2, allow_nan=False) + "\n")
            write_manifest(beside)
            beside.rename(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        sync(directory)
        write_text(directory / LATEST_FILE, path.name + "\n")
    return path


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint's directory, once all of it has been compared with its manifest.

    Raises:
        CheckpointError: anything in it is missing, damaged, foreign or of another release.
    """
    verify(path, FILES)
    state = _read_state(path / STATE_FILE)
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read_tensors(path / OPTIMIZER_FILE).items():
        kind, _, name = key.partition(".")
        moments.setdefault(kind, {})[name] = tensor
    try:
        # The number of layers is of use for directories of PEFT alone.
        adapter = read_adapter(path, "", ())
    except AdapterError as error:
        raise CheckpointError(str(error)) from error
    for kind, by_name in moments.items():
        for name in by_name:
            if name not in adapter.tensors:
                raise CheckpointError(
                    f"{path / OPTIMIZER_FILE}: holds {kind}.{name}, of no parameter in {WEIGHTS_FILE}; "
                    f"{USE_ANOTHER}"
                )
    return Checkpoint(parameters=adapter.tensors, moments=moments, **state)


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, the newest first; none has been read.

    Raises:
        CheckpointError: the directory cannot be read.
    """
    try:
        names = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"{directory}: cannot be read ({error.strerror}); mend its permissions or choose another run"
        ) from error
    return sorted(names, key=_order, reverse=True)


def newest_checkpoint(directory: Path, warn: Callable[[str], object]) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that is whole, and its directory; None where there has never been one.

    Args:
        directory: of a run's checkpoints.
        warn: told of every damaged one that is passed over, and of the one used in its place.

    Raises:
        CheckpointError: there are checkpoints but none can be used: a run never starts anew by itself.
    """
    problems = []
    for path in complete_checkpoints(directory):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in (*problems, *_missing(directory, path)):
            warn(f"{problem}. {path.name} is used in its place")
        return path, checkpoint
    problems += _missing(directory)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(
            f"{directory}: no checkpoint can be used; restore one, or begin under another run.name{listed}"
        )
    return None


def _missing(directory: Path, found: Path | None = None) -> list[str]:
    """The line about a checkpoint newer than `found` that `latest` names but that is not there."""
    try:
        named = directory / (directory / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return []
    if not _NAME.fullmatch(named.name) or named.exists() or (found and _order(named) < _order(found)):
        return []
    return [f"{directory / LATEST_FILE}: names {named.name}, which is gone"]


def prune(directory: Path, newest: Path, *, keep: int, keep_best: bool) -> None:
    """Deletes the checkpoints that are not wanted once `newest` is written.

    Wanted are the `keep` newest up to this one, and the one with the least validation loss. What is of later
    steps belongs to a run that was not continued, or is damaged, and goes too.

    Args:
        directory: of a run's checkpoints.
        newest: the checkpoint written last.
        keep: how many, at least 1.
        keep_best: whether to keep the best one beyond these.

    Raises:
        CheckpointError: one cannot be deleted.
    """
    paths = complete_checkpoints(directory)
    by_step: dict[int, Path] = {}
    for path in paths:
        if _order(path) <= _order(newest):
            by_step.setdefault(_order(path)[0], path)
    wanted = list(by_step.values())[:keep]
    if keep_best:
        evaluated = {path: _evaluated(path) for path in by_step.values()}
        # Of other data than the newest one was evaluated on a loss says nothing.
        data = evaluated[by_step[_order(newest)[0]]][1]
        losses = {path: loss if data in (of, None) else math.inf for path, (loss, of) in evaluated.items()}
        # Of equal ones the newest.
        wanted.append(min(by_step.values(), key=losses.__getitem__))
    with explained(directory):
        for path in paths:
            if path not in wanted:
                _delete(path)


def remove_leftovers(directory: Path) -> None:
    """Deletes what a kill has left half written or half deleted; for the start of a run, which owns it all.

    Raises:
        CheckpointError: something cannot be deleted.
    """
    if directory.is_dir():
        with explained(directory):
            for path in directory.iterdir():
                if _HIDDEN.fullmatch(path.name):
                    _delete_content(path)


def extract_adapter(path: Path, out: Path) -> None:
    """Copies the adapter directory out of a checkpoint, which is verified first.

    Args:
        path: a checkpoint's directory.
        out: the new directory; must not exist.

    Raises:
        CheckpointError: the checkpoint is damaged, or `out` exists or cannot be written.
    """
    otherwise = "choose another --out"
    if out.exists():
        raise CheckpointError(f"{out}: exists, and nothing in it is overwritten; {otherwise}")
    read_checkpoint(path)
    beside = _hidden(out, "partial")
    with explained(out, otherwise):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.mkdir()
            for name in ADAPTER_FILES:
                shutil.copyfile(path / name, beside / name)
                sync(beside / name)
            sync(beside)
            beside.rename(out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        sync(out.parent)


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    loss = checkpoint.validation_loss
    return {
        "step": checkpoint.step,
        "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
        "base_fingerprint": checkpoint.base_fingerprint,
        "progress": checkpoint.progress,
        "config_sha256": _digest(checkpoint.config),
        "config": checkpoint.config,
        "contents": checkpoint.contents,
    }


def _read_state(path: Path) -> dict[str, Any]:
    """What `_state` made, checked: the fields of `Checkpoint` that are no tensors."""
    state = read_object(path)
    kinds: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "validation_loss": (float, int, type(None)),
        "base_fingerprint": str,
        "progress": dict,
        "config_sha256": str,
        "config": dict,
        "contents": dict,
    }
    if state.keys() != kinds.keys():
        raise CheckpointError(
            f"{path}: holds {', '.join(state) or 'nothing'}, where {', '.join(kinds)} belong; {USE_ANOTHER}"
        )
    for key, kind in kinds.items():
        if not isinstance(state[key], kind) or isinstance(state[key], bool):
            raise CheckpointError(f"{path}: {key} is {_shown(state[key])}; it is damaged; {USE_ANOTHER}")
    if state["step"] < 0:
        raise CheckpointError(f"{path}: step is {state['step']}; it is damaged; {USE_ANOTHER}")
    if state.pop("config_sha256") != _digest(state["config"]):
        raise CheckpointError(f"{path}: config_sha256 is not that of config; it is damaged; {USE_ANOTHER}")
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); {USE_ANOTHER}") from error


def _evaluated(path: Path) -> tuple[float, str | None]:
    """A checkpoint's validation loss, infinite where it has none or cannot be read, and of which data."""
    try:
        state = _read_state(path / STATE_FILE)
    except CheckpointError:
        return math.inf, None
    loss = state["validation_loss"]
    return math.inf if loss is None else float(loss), state["contents"].get("validation")


def _keyed(moments: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": tensor for kind, by_name in moments.items() for name, tensor in by_name.items()}


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _check_space(directory: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(
            f"{directory}: a checkpoint needs {num_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; "
            "free some, lower checkpoint.keep or choose another run.output_dir"
        )


def _order(path: Path) -> tuple[int, int]:
    """Step and number of a checkpoint's directory."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def _unused(directory: Path, step: int) -> Path:
    """The next name for a checkpoint of `step`."""
    taken = [_order(path)[1] for path in complete_checkpoints(directory) if _order(path)[0] == step]
    return directory / (f"step-{step:08d}" + (f"-{max(taken) + 1}" if taken else ""))


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _delete(path: Path) -> None:
    """Takes a checkpoint's name away, then deletes it."""
    hidden = _hidden(path, "removed")
    path.rename(hidden)
    sync(hidden.parent)
    _delete_content(hidden)


def _delete_content(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
