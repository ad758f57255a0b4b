"""Where weights come from: one named tensor at a time, out of a checkpoint or drawn from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.location import WEIGHTS_FILE, WEIGHTS_INDEX_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STORED_DTYPES = ("F64", "F32", "F16", "BF16")
FETCH_AGAIN = "the file is damaged or incomplete; copy or download it again"


class WeightSource(Protocol):
    """What the loader reads from; reading one tensor costs nothing for the others."""

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises ModelError unless every tensor named can be read in the shape given."""

    def read(self, name: str, *, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor `name`, as a new tensor on `device` in `dtype`."""


class SafetensorsWeights:
    """The safetensors checkpoint in a directory: one file, or shards with an index.

    A file is opened for one tensor and closed again: it is mapped into memory, and what was read of it
    counts as this process's memory for as long as it stays open.

    Args:
        directory: of the model.
        aliases: names under which a tensor may be stored instead, where its own is absent.

    Raises:
        ModelError: there are no safetensors weights, or the index cannot be read.
    """

    def __init__(self, directory: Path, aliases: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self._files = _files_by_tensor(directory)
        self._aliases = dict(aliases or {})

    @property
    def names(self) -> list[str]:
        """Names of all tensors stored, sorted."""
        return sorted(self._files)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raises ModelError unless every tensor is there, in its shape, in a floating dtype.

        Only headers are read, and only those of the files that hold these tensors.
        """
        stored = {name: self._stored_name(name) for name in shapes}
        missing = [name for name in shapes if stored[name] not in self._files]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ModelError(
                f"{self.directory}: the weights lack {shown}; `config.json` and the weights are not of one "
                "model, or a part of it was not downloaded"
            )
        for file in sorted({self._files[name] for name in stored.values()}):
            with _open(file) as handle:
                in_file = set(handle.keys())
                for name, stored_name in stored.items():
                    if self._files[stored_name] == file:
                        _check_entry(handle, in_file, stored_name, shapes[name], file)

    def read(self, name: str, *, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor `name`, as a new tensor on `device` in `dtype`."""
        stored_name = self._stored_name(name)
        if stored_name not in self._files:
            raise ModelError(f"{self.directory}: the weights lack {name}")
        file = self._files[stored_name]
        with _open(file, stored_name) as handle:
            tensor: Tensor = handle.get_tensor(stored_name)
            if tensor.shape != shape:
                raise ModelError(_shape_message(file, stored_name, list(tensor.shape), shape))
            return tensor.to(device=device, dtype=dtype, copy=True)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same, or one of them is not stored."""
        if first not in self._files or second not in self._files:
            return True
        with _open(self._files[first], first) as a, _open(self._files[second], second) as b:
            return torch.equal(a.get_tensor(first), b.get_tensor(second))

    def digest(self, num_bytes: int) -> str:
        """sha256 over each tensor's name, dtype, shape, and first and last `num_bytes` bytes.

        The same for any sharding of the same tensors.
        """
        digests: dict[str, bytes] = {}
        for file in sorted(set(self._files.values())):
            with _open(file) as handle:
                for name in list(handle.keys()):
                    entry = handle.get_slice(name)
                    tensor = handle.get_tensor(name).reshape(-1).view(torch.uint8)
                    digest = hashlib.sha256(f"{name} {entry.get_dtype()} {entry.get_shape()}".encode())
                    digest.update(tensor[:num_bytes].numpy().tobytes())
                    digest.update(tensor[-num_bytes:].numpy().tobytes())
                    digests[name] = digest.digest()
        return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()

    def _stored_name(self, name: str) -> str:
        return name if name in self._files else self._aliases.get(name, name)


class RandomWeights:
    """Weights drawn as a new model's: a function of (seed, tensor name, shape) alone.

    They depend neither on rank, device, dtype nor on which of them are read, so that a stage that draws
    only its own has the same.

    Args:
        seed: of the model.
        std: standard deviation of matrices.
        norm_weight: value of norm weights; biases are zero.
        padding_rows: rows set to zero, by tensor name: an embedding's padding token.
    """

    def __init__(
        self, seed: int, *, std: float, norm_weight: float, padding_rows: Mapping[str, int] | None = None
    ) -> None:
        self._seed, self._std, self._norm_weight = seed, std, norm_weight
        self._padding_rows = dict(padding_rows or {})

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Every tensor can be drawn."""

    def read(self, name: str, *, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor `name`, drawn in float32 on the CPU, on `device` in `dtype`."""
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else self._norm_weight
            return torch.full(shape, value, dtype=dtype, device=device)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(
            0, self._std, generator=generator
        )
        if name in self._padding_rows:
            drawn[self._padding_rows[name]] = 0
        return drawn.to(device=device, dtype=dtype)


def initializer_std(config: PreTrainedConfig) -> float:
    """Standard deviation of a new model's matrices."""
    return float(getattr(config, "initializer_range", None) or 0.02)


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    index, single = directory / WEIGHTS_INDEX_FILE, directory / WEIGHTS_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: directory / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not an index of safetensors shards; {FETCH_AGAIN}") from error
    if single.is_file():
        with _open(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    pickled = sorted(directory.glob("pytorch_model*.bin"))
    if pickled:
        raise ModelError(
            f"{pickled[0]}: weights stored as pickle are refused, because reading them runs code that came "
            "with them; name a directory or revision with safetensors or, where you trust them, convert them "
            f"once: AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(NEW_DIRECTORY)"
        )
    raise ModelError(
        f"{directory}: holds no safetensors weights ({WEIGHTS_FILE}, or shards with {WEIGHTS_INDEX_FILE}), "
        "and weights stored as pickle are refused; name a directory or revision that has them, or convert "
        "the weights once with transformers' save_pretrained"
    )


@contextmanager
def _open(file: Path, name: str | None = None) -> Iterator[Any]:
    """An open safetensors file; errors of reading it name `file`, and the tensor `name` where one is read."""
    from safetensors import SafetensorError, safe_open

    wanted = f" while reading {name}" if name else ""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except FileNotFoundError as error:
        raise ModelError(
            f"{file}: missing{wanted}, though {WEIGHTS_INDEX_FILE} names it; copy or download it"
        ) from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: cannot be read{wanted} ({error}); {FETCH_AGAIN}") from error


def _check_entry(handle: Any, in_file: set[str], name: str, shape: torch.Size, file: Path) -> None:
    if name not in in_file:
        raise ModelError(f"{file}: lacks {name}, though {WEIGHTS_INDEX_FILE} says it is here; {FETCH_AGAIN}")
    entry = handle.get_slice(name)
    if list(entry.get_shape()) != list(shape):
        raise ModelError(_shape_message(file, name, entry.get_shape(), shape))
    if entry.get_dtype() not in STORED_DTYPES:
        raise ModelError(
            f"{file}: {name} is stored as {entry.get_dtype()}; only {', '.join(STORED_DTYPES)} are read, so "
            "name the original, unquantised model"
        )


def _shape_message(file: Path, name: str, found: list[int], expected: torch.Size) -> str:
    return (
        f"{file}: {name} has the shape {found}, but `config.json` asks for {list(expected)}; configuration "
        "and weights are not of one model"
    )
