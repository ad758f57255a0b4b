"""From the path or hub name of a model to a directory on this machine."""

from __future__ import annotations

from pathlib import Path

from ssmlora_dist.errors import ModelError
from ssmlora_dist.progress import progress

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

METADATA_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")
WEIGHTS_PATTERNS = ("model*.safetensors",)


def locate(path: str, revision: str | None = None, *, weights: bool, place: str = "model.path") -> Path:
    """The directory that holds the files of `path`, downloaded from the hub where it is no directory.

    Args:
        path: a directory, or the name of a model on the hub.
        revision: branch, tag or commit on the hub; None takes the default branch.
        weights: whether the safetensors weights are wanted beside configuration and tokenizer.
        place: dotted path of the setting that named the model, for messages.

    Raises:
        ModelError: there is no such directory or model, it is gated, or the hub cannot be reached.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ModelError(f"{place}: {path} is a file; name the directory that holds the model")
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ModelError(
            f"{place}: there is no directory {path}; name an existing one, or a model on the hub"
        )
    return _download(path, revision, weights, place)


def _download(name: str, revision: str | None, weights: bool, place: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    patterns = [*METADATA_PATTERNS, *(WEIGHTS_PATTERNS if weights else ())]
    local = "or give the path of a local directory"
    try:
        # The library's own bars, of bytes, are for terminals alone.
        with progress(f"fetching {name} from the hub"):
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{place}: the hub gives {name} only to those who were granted access; ask for it on the model's "
            f"page and sign in with `hf auth login`, {local}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"model.revision: {name} has no revision {revision!r} on the hub; name a branch, tag or commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{place}: {name} is neither a directory here nor a model on the hub that you may see; correct "
            f"the name, sign in with `hf auth login` if it is private, {local}"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(
            f"{place}: {name!r} is neither a directory here nor a possible name on the hub; correct it"
        ) from error
    # Anything between a missing proxy and a full disk, in the words of several libraries.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{place}: {name} is no directory here, and could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); check the connection, {local}"
        ) from error
