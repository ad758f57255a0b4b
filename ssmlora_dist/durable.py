"""Writing files so that a kill leaves either the old content or the new one, never half of it."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ssmlora_dist.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_REASONS = {
    errno.EACCES: "no permission to write; change its permissions or",
    errno.EPERM: "no permission to write; change its permissions or",
    errno.EROFS: "the file system is read-only;",
    errno.ENOSPC: "no space left on the device; free some or",
    errno.EDQUOT: "the disk quota is used up; free some space or",
    errno.EFBIG: "a file would be larger than is allowed; raise the limit or",
    errno.ENOTDIR: "a part of this path is a file, not a directory;",
    errno.EEXIST: "a part of this path is a file, not a directory;",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it is synced and takes the place of `path`.

    When the body raises, what was written is removed and `path` stays as it was.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces the content of `path` by `text` (UTF-8), all or nothing."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaces the content of `path` by `tensors` as a safetensors file, all or nothing."""
    from safetensors.torch import save

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # As bytes: safetensors' own writing of files has errors of its own, and makes files private.
    with replacing(path) as beside:
        beside.write_bytes(save(contiguous, metadata={"format": "pt"}))


@contextmanager
def explained(path: Path, otherwise: str = "choose another run.output_dir") -> Iterator[None]:
    """Turns what the file system refuses while `path` is written into an error with a remedy.

    Args:
        path: for the message.
        otherwise: what to do where the cause cannot be mended.

    Raises:
        CheckpointError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"{error.strerror or error};")
        raise CheckpointError(f"{path}: cannot be written: {reason} {otherwise}") from error


def sync(path: Path) -> None:
    """Waits until the content of a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
