"""Plain reads of safetensors files, against the format's own library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.safetensors_file import DTYPES, stored_tensors

SEED = 3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Tensors of every dtype that is read and some that are not, of all sorts of shapes."""
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    tensors: dict[str, Tensor] = {
        str(dtype): torch.randn(7, 5, generator=generator).to(dtype) for dtype in DTYPES.values()
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "cube": torch.randn(3, 2, 2)}
    tensors |= {"bytes": torch.arange(9, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_are_those_of_the_formats_own_library(file: Path) -> None:
    expected = load_file(file)
    stored = stored_tensors(file)
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].shape == tensor.shape
        if stored[name].dtype in DTYPES:
            assert torch.equal(stored[name].read(), tensor), name
            assert stored[name].read().dtype == tensor.dtype
    assert stored["bytes"].dtype == "U8"


@pytest.mark.parametrize("rows", [range(0, 7), range(0, 3), range(3, 7), range(6, 7), range(4, 4)])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_rows(dtype: torch.dtype, rows: range, file: Path) -> None:
    whole = load_file(file)[str(dtype)]
    assert torch.equal(stored_tensors(file)[str(dtype)].read(rows), whole[rows.start : rows.stop])


def test_rows_of_more_than_two_dimensions(file: Path) -> None:
    assert torch.equal(stored_tensors(file)["cube"].read(range(1, 3)), load_file(file)["cube"][1:])


@pytest.mark.parametrize("num_bytes", [0, 1, 8, 9, 100])
def test_ends(num_bytes: int, file: Path) -> None:
    content = bytes(range(9))
    size = min(num_bytes, 9)
    assert stored_tensors(file)["bytes"].ends(num_bytes) == content[:size] + content[9 - size :]


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def written(header: object, data: bytes = b"\x00" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x00\x00",
        b"\xff" * 16,
        (100).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"oops",
        (2).to_bytes(8, "little") + b"\xff\xfe",
        written([]),
        written({"a": 3}),
        written({"a": {}}),
        written({"a": entry(shape=["x"])}),
        written({"a": entry(shape=[3])}),
        written({"a": entry(data_offsets=[8, 0])}),
        written({"a": entry(data_offsets=[-8, 0])}),
        written({"a": entry(data_offsets=[8, 16])}),
        written({"a": entry()}, b"\x00" * 7),
    ],
)
def test_what_is_no_whole_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(written({"a": entry()}))
    assert stored_tensors(file)["a"].read().tolist() == [0.0, 0.0]
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read .*download it again"):
        stored_tensors(file)


def test_a_file_cut_off_or_gone_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(written({"a": entry()}))
    tensor = stored_tensors(file)["a"]
    file.write_bytes(written({"a": entry()})[:-1])
    with pytest.raises(ModelError, match="cannot be read while reading a"):
        tensor.read()
    with pytest.raises(ModelError, match="cannot be read while reading a"):
        tensor.ends(4)
    file.unlink()
    with pytest.raises(ModelError, match="missing while reading a"):
        tensor.read()
