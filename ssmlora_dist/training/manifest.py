"""What a directory holds, written down so that any damage to it is found before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ssmlora_dist.durable import write_text
from ssmlora_dist.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 2
USE_ANOTHER = "use another checkpoint, or copy this one again from where it is whole"
# More than any that is written; what is larger would only fill the memory.
MAX_JSON_BYTES = 64 * 2**20
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def write_manifest(directory: Path) -> None:
    """Writes the manifest of all files in `directory`, to be called when they are complete."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(directory.iterdir())
    }
    write_text(directory / MANIFEST_FILE, _text(FORMAT_VERSION, files))


def verify(directory: Path, names: Collection[str]) -> None:
    """Checks that `directory` holds the files `names`, each as the manifest says, and nothing else.

    No file but the manifest is interpreted.

    Args:
        directory: what `write_manifest` was given.
        names: of the files, the manifest aside.

    Raises:
        CheckpointError: the first thing that is wrong, with the remedy.
    """
    sizes = _sizes(directory, [*names, MANIFEST_FILE])
    files = _read_manifest(directory / MANIFEST_FILE)
    if set(files) != set(names):
        raise CheckpointError(
            f"{directory / MANIFEST_FILE}: lists {', '.join(sorted(files))}, where "
            f"{', '.join(sorted(names))} belong; {USE_ANOTHER}"
        )
    for name, entry in files.items():
        if sizes[name] != entry["size"]:
            raise CheckpointError(
                f"{directory / name}: has {sizes[name]} bytes, the manifest says {entry['size']}; it was cut "
                f"or changed; {USE_ANOTHER}"
            )
    for name, entry in files.items():
        if _sha256(directory / name) != entry["sha256"]:
            raise CheckpointError(
                f"{directory / name}: its checksum is not the manifest's; it is damaged; {USE_ANOTHER}"
            )


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {USE_ANOTHER}") from error
    # Not UTF-8, not JSON, or numbers or nesting beyond what the parser takes.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); it is damaged; {USE_ANOTHER}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object; it is damaged; {USE_ANOTHER}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")


def _sizes(directory: Path, names: Collection[str]) -> dict[str, int]:
    """Size of each file; refuses whatever is not one of the plain files `names`, or is not there."""
    try:
        if not stat.S_ISDIR(directory.lstat().st_mode):
            raise CheckpointError(f"{directory}: is no directory of its own; name the checkpoint's directory")
        entries = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(directory)}
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: no such checkpoint; correct the path") from None
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror}); {USE_ANOTHER}") from error
    if not entries.keys() & set(names):
        raise CheckpointError(f"{directory}: is no checkpoint; name a run or one of its checkpoints")
    for name in sorted(entries):
        if name.endswith(_PICKLES):
            raise CheckpointError(
                f"{directory / name}: looks like a pickle; a checkpoint holds none, as reading one runs code "
                f"that came with it; {USE_ANOTHER}"
            )
        if name not in names:
            raise CheckpointError(f"{directory / name}: does not belong into a checkpoint; remove it")
        if not stat.S_ISREG(entries[name].st_mode):
            raise CheckpointError(f"{directory / name}: a link or no file; {USE_ANOTHER}")
    for name in names:
        if name not in entries:
            raise CheckpointError(
                f"{directory}: holds no {name}: it is no checkpoint or incomplete; {USE_ANOTHER}"
            )
    return {name: entry.st_size for name, entry in entries.items()}


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    content = read_object(path)
    files, version = content.get("files"), content.get("format_version")
    # Written anew from what was understood of it, it must be the same to the last byte.
    if not _is_listing(files) or path.read_bytes() != _text(version, files).encode():
        raise CheckpointError(f"{path}: is damaged; {USE_ANOTHER}")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}; use the release that "
            "wrote it"
        )
    return files


def _is_listing(files: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    return isinstance(files, dict) and all(
        isinstance(entry, dict)
        and entry.keys() == {"size", "sha256"}
        and type(entry["size"]) is int
        and isinstance(entry["sha256"], str)
        for entry in files.values()
    )


def _text(version: Any, files: Mapping[str, Any]) -> str:
    """The manifest's own text, with a checksum of itself in the last line."""
    content = {"format_version": version, "files": files}
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": checksum}, indent=2) + "\n"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); {USE_ANOTHER}") from error
