"""From the path or hub name of a model to a directory on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmlora_dist.errors import ModelError
from ssmlora_dist.progress import progress

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

METADATA_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")
WEIGHTS_PATTERNS = ("model*.safetensors",)


def locate(path: str, revision: str | None = None, *, weights: bool, where: str = "model.path") -> Path:
    """The directory that holds the files of `path`, downloaded from the hub where it is no directory.

    Args:
        path: a directory, or the name of a model on the hub.
        revision: branch, tag or commit on the hub; None takes the default branch.
        weights: whether the safetensors weights are wanted beside configuration and tokenizer.
        where: dotted path of the setting that named the model, for messages.

    Raises:
        ModelError: there is no such directory or model, it is gated, or the hub cannot be reached.
    """
    directory = Path(os.path.expanduser(path))
    try:
        if directory.is_dir():
            return directory
        is_file = directory.exists()
    except OSError as error:
        raise ModelError(
            f"{where}: the system refuses {path} ({error.strerror}); name another directory"
        ) from None
    if is_file:
        raise ModelError(f"{where}: {path} is a file; name the directory that holds the model")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ModelError(
            f"{where}: there is no directory {path}; name an existing one, or a model on the hub"
        )
    return _download(path, revision, weights, where)


def locate_base(adapter: Path, base: Mapping[str, Any], path: str | None, *, weights: bool) -> Path | None:
    """The directory of an adapter's base model; None where neither the adapter nor `path` names one.

    Args:
        adapter: directory of the adapter.
        base: what it records of its base model.
        path: given with `--model` in place of what is recorded.
        weights: as for `locate`.

    Raises:
        ModelError: as for `locate`; the message names the option.
    """
    if path is not None:
        return locate(path, weights=weights, where="--model")
    if base.get("path") is None:
        return None
    where = f"--model (by default as {adapter} records it)"
    return locate(base["path"], base.get("revision"), weights=weights, where=where)


def _download(name: str, revision: str | None, weights: bool, where: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [*METADATA_PATTERNS, *(WEIGHTS_PATTERNS if weights else ())]
    local = "or give the path of a local directory"
    try:
        # The library's own bars, of bytes, are for terminals alone.
        with progress(f"fetching {name} from the hub"):
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{where}: the hub gives {name} only to those who were granted access; ask for it on the model's "
            f"page and sign in with `hf auth login`, {local}"
        ) from error
    except errors.RevisionNotFoundError as error:
        setting = "model.revision" if where.startswith("model.") else where
        raise ModelError(
            f"{setting}: {name} has no revision {revision!r} on the hub; name a branch, tag or commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{where}: {name} is neither a directory here nor a model on the hub that you may see; correct "
            f"the name, sign in with `hf auth login` if it is private, {local}"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(
            f"{where}: {name!r} is neither a directory here nor a possible name on the hub; correct it"
        ) from error
    # Anything between a missing proxy and a full disk, in the words of several libraries.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{where}: {name} is no directory here, and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the connection, {local}"
        ) from error
