"""Tensors in a safetensors file: where each lies, and plain reads of exactly its bytes.

The format's own library maps a file into memory. What the kernel then reads ahead around every tensor, some
megabytes on some machines, is lost on a process that needs only a part of the file; and whatever was read
counts as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmlora_dist.errors import ModelError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What holds numbers, by the format's own names."""
CODES = "U8"
_READABLE = {**DTYPES, CODES: torch.uint8}
FETCH_AGAIN = "the file is damaged or incomplete; copy or download it again"
_LENGTH_BYTES = 8  # in front of the header: its length, little-endian


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        file: that holds it.
        name: in the file.
        dtype: by the format's name, one of `DTYPES`, `CODES` or another.
        shape: of the whole tensor.
        begin: where its bytes begin in the file.
        num_bytes: their number.
    """

    file: Path
    name: str
    dtype: str
    shape: torch.Size
    begin: int
    num_bytes: int

    def read(self, rows: range | None = None) -> Tensor:
        """The tensor, or consecutive rows of it, in the dtype that it is stored in, on the CPU.

        Raises:
            ModelError: the file cannot be read.
        """
        begin, shape = self.begin, self.shape
        if rows is not None:
            begin += rows.start * (self.num_bytes // shape[0])
            shape = torch.Size((len(rows), *shape[1:]))
        tensor = torch.empty(shape, dtype=_READABLE[self.dtype])
        self._read_into(tensor.view(-1).view(torch.uint8).numpy().data, begin)
        return tensor

    def ends(self, num_bytes: int) -> bytes:
        """Its first and its last `num_bytes` bytes, or all bytes twice where there are fewer.

        Raises:
            ModelError: the file cannot be read.
        """
        size = min(num_bytes, self.num_bytes)
        content = bytearray(2 * size)
        self._read_into(memoryview(content)[:size], self.begin)
        self._read_into(memoryview(content)[size:], self.begin + self.num_bytes - size)
        return bytes(content)

    def _read_into(self, buffer: memoryview, begin: int) -> None:
        with _opened(self.file, self.name) as stream:
            stream.seek(begin)
            _fill(buffer, stream)


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of `file` by name; only its header is read.

    Raises:
        ModelError: it is missing, or not a whole safetensors file.
    """
    with _opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(_read(stream, _LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if start > size:
            raise ValueError("it ends within its header")
        header = json.loads(_read(stream, length))
        header.pop("__metadata__", None)
        tensors = {name: _entry(file, name, entry, start) for name, entry in header.items()}
        if any(tensor.begin + tensor.num_bytes > size for tensor in tensors.values()):
            raise ValueError("it ends too early")
        return tensors


def _entry(file: Path, name: str, entry: dict[str, Any], start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    tensor = StoredTensor(file, name, entry["dtype"], torch.Size(entry["shape"]), start + begin, end - begin)
    dtype = _READABLE.get(tensor.dtype)
    if begin < 0 or (dtype is not None and math.prod(tensor.shape) * dtype.itemsize != tensor.num_bytes):
        raise ValueError(f"its header is wrong about {name}")
    return tensor


@contextmanager
def _opened(file: Path, name: str | None = None) -> Iterator[FileIO]:
    """The file, read without reading ahead; errors of reading it, or `name` in it, become our own."""
    wanted = f" while reading {name}" if name else ""
    try:
        with file.open("rb", buffering=0) as stream:
            # One ordinary read is enough to leave marks in the page cache at which later ones read ahead.
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            yield stream
    except FileNotFoundError as error:
        raise ModelError(
            f"{file}: missing{wanted}, though the index of the shards names it; copy or download it"
        ) from error
    # What a header can be wrong in, and a disk.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read{wanted} ({error}); {FETCH_AGAIN}") from error


def _read(stream: FileIO, num_bytes: int) -> bytes:
    content = bytearray(num_bytes)
    _fill(memoryview(content), stream)
    return bytes(content)


def _fill(buffer: memoryview, stream: FileIO) -> None:
    while buffer:
        count = stream.readinto(buffer)
        if not count:
            raise ValueError("it ends too early")
        buffer = buffer[count:]
