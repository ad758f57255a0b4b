"""Where weights come from: one named tensor at a time, out of a checkpoint or drawn from a seed."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.location import WEIGHTS_FILE, WEIGHTS_INDEX_FILE
from ssmlora_dist.models.safetensors_file import DTYPES, FETCH_AGAIN, StoredTensor, stored_tensors
from ssmlora_dist.progress import counted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# Buffers that older releases of transformers stored, and that are computed today.
COMPUTED_BUFFERS = (
    r"rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)$",
    r"\.masked_bias$",
    r"(^|\.)position_ids$",
)
# What the tools that store weights quantised leave beside them or in their place.
_QUANTIZERS = {
    "bitsandbytes": r"\.(weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)"
    r"|SCB|weight_format)$",
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "another tool": r"\.(weight_(packed|scale|scale_inv|scales|zero_point|shape|qdata)|weight\._(data|scale)"
    r"|input_scale|input_scale_ub|W_q|codebooks)$",
}
# Of dense weights and buffers beside them: all other dtypes are what quantised weights are stored in.
_DENSE_DTYPES = {*DTYPES, "BOOL", "I64"}
_REMEDY = "name the original, unquantised model: it is quantised while it is loaded"


class WeightSource(Protocol):
    """What the loader reads from; reading one tensor costs nothing for the others."""

    def check(
        self, shapes: Mapping[str, torch.Size], known: Collection[str], ignored: Iterable[str] = ()
    ) -> None:
        """Raises ModelError unless what is stored is what the model needs.

        Args:
            shapes: of the tensors that are going to be read, by name.
            known: names of all tensors of the model; nothing else may be stored.
            ignored: regular expressions of names that may be stored all the same.
        """

    def read(self, name: str, *, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor `name`, as a new tensor on `device` in `dtype`."""


class SafetensorsWeights:
    """The safetensors checkpoint in a directory: one file, or shards with an index.

    Args:
        directory: of the model.
        aliases: names under which a tensor may be stored instead, where its own is absent.

    Raises:
        ModelError: there are no safetensors weights, the index cannot be read, or they are stored quantised.
    """

    def __init__(self, directory: Path, aliases: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self._aliases = dict(aliases or {})
        # Names of tensors that are not numbers but codes, which whoever reads them understands.
        self._codes: Collection[str] = ()
        self._tensors: dict[Path, dict[str, StoredTensor]] = {}
        self._files = _files_by_tensor(directory, self._in_file)
        for tool, pattern in _QUANTIZERS.items():
            if found := next(filter(re.compile(pattern).search, self._files), None):
                raise ModelError(
                    f"{directory}: {found}: the weights are stored quantised by {tool}; {_REMEDY}"
                )

    @property
    def names(self) -> list[str]:
        """Names of all tensors stored, sorted."""
        return sorted(self._files)

    @property
    def files(self) -> list[Path]:
        """All files that hold tensors, sorted."""
        return sorted(set(self._files.values()))

    def check(
        self, shapes: Mapping[str, torch.Size], known: Collection[str], ignored: Iterable[str] = ()
    ) -> None:
        """Raises ModelError unless every tensor is there, in its shape, in a floating dtype, and no other.

        Only headers are read, and only those of the files that hold the tensors of `shapes`.
        """
        missing = [name for name in shapes if self._stored_name(name) not in self._files]
        if missing:
            for file in self.files:
                for tensor in self._in_file(file).values():
                    self._refuse_codes(tensor)
            if unread := self._unread(known, ignored):
                raise ModelError(
                    f"{self.directory}: the weights lack {_listed(missing)}; they hold instead "
                    f"{_listed(unread)}; save the model that `config.json` describes, by itself, with "
                    "transformers' `save_pretrained`"
                )
            raise ModelError(
                f"{self.directory}: the weights lack {_listed(missing)}; `config.json` and the weights are "
                "not of one model, or a part of it was not downloaded"
            )
        for name, shape in shapes.items():
            self.stored(name, shape)
        self._refuse_unread(known, ignored)

    def read(
        self,
        name: str,
        *,
        shape: torch.Size,
        device: torch.device,
        dtype: torch.dtype,
        rows: range | None = None,
    ) -> Tensor:
        """The tensor `name` of `shape`, or consecutive rows of it, as a new tensor on `device` in `dtype`.

        Raises:
            ModelError: it cannot be read, or is not finite throughout.
        """
        entry = self.stored(name, shape)
        stored = entry.read(rows)
        tensor = stored.to(device=device, dtype=dtype)
        if not is_finite(tensor):
            if is_finite(stored):
                problem, remedy = f"numbers beyond the range of {dtype}", "choose a wider compute dtype"
            else:
                problem, remedy = (
                    "numbers that are not finite",
                    "the model is damaged: fetch it again",
                )
            raise ModelError(f"{entry.file}: {entry.name} holds {problem}; {remedy}")
        return tensor

    def equal(self, first: str, second: str, rows: Callable[[int], range] = range) -> bool:
        """Whether two tensors are the same, or one of them is not stored.

        Args:
            first: name of the one.
            second: name of the other.
            rows: which rows are compared, of how many; by default all.
        """
        if first not in self._files or second not in self._files:
            return True
        one, other = self.stored(first), self.stored(second)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        compared = rows(one.shape[0])
        first_bytes, second_bytes = (each.read(compared).view(torch.uint8) for each in (one, other))
        # As bytes, in which NaN equals itself: what is not finite is refused as it is read.
        return torch.equal(first_bytes, second_bytes)

    def digest(self, num_bytes: int) -> str:
        """sha256 over each tensor's name, dtype, shape, and first and last `num_bytes` bytes.

        The same for any sharding of the same tensors.
        """
        digests: dict[str, bytes] = {}
        for file in counted(self.files, "taking the fingerprint of the base model", len(self.files)):
            for name, tensor in self._in_file(file).items():
                digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.ends(num_bytes))
                digests[name] = digest.digest()
        return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()

    def stored(self, name: str, shape: torch.Size | None = None) -> StoredTensor:
        """Where the tensor lies; refuses one that is not there, not of `shape` or not floating."""
        tensor = self._located(name)
        self._refuse_codes(tensor)
        if tensor.dtype not in DTYPES:
            raise ModelError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}; only {', '.join(DTYPES)} are "
                "read, so convert it, or name a model that is stored in one of these"
            )
        if shape is not None and tensor.shape != shape:
            raise ModelError(
                f"{tensor.file}: {tensor.name} has the shape {list(tensor.shape)}, but `config.json` asks "
                f"for {list(shape)}; configuration and weights are not of one model"
            )
        return tensor

    def _located(self, name: str) -> StoredTensor:
        """Where the tensor lies, whatever it is."""
        stored_name = self._stored_name(name)
        if stored_name not in self._files:
            raise ModelError(f"{self.directory}: the weights lack {name}")
        file = self._files[stored_name]
        tensor = self._in_file(file).get(stored_name)
        if tensor is None:
            raise ModelError(
                f"{file}: lacks {stored_name}, though {WEIGHTS_INDEX_FILE} says it is here; {FETCH_AGAIN}"
            )
        return tensor

    def _refuse_codes(self, tensor: StoredTensor) -> None:
        if tensor.dtype not in _DENSE_DTYPES and tensor.name not in self._codes:
            raise ModelError(
                f"{tensor.file}: {tensor.name} is stored as {tensor.dtype}: the weights are stored "
                f"quantised; {_REMEDY}"
            )

    def _refuse_unread(self, known: Collection[str], ignored: Iterable[str]) -> None:
        for file, tensors in self._tensors.items():
            if stray := sorted(tensors.keys() - self._files.keys()):
                raise ModelError(
                    f"{file}: holds {_listed(stray)}, which {WEIGHTS_INDEX_FILE} does not name; the index is "
                    "of other files: fetch or save the model again"
                )
        if unread := self._unread(known, ignored):
            raise ModelError(
                f"{self.directory}: the weights hold what `config.json` has no place for: {_listed(unread)}; "
                f"without it this would be another model: mend {_settings_of(unread, known)} there or, if "
                "the model needs none of it, remove it from the weights"
            )

    def _unread(self, known: Collection[str], ignored: Iterable[str]) -> list[str]:
        allowed = re.compile("|".join([*COMPUTED_BUFFERS, *ignored]))
        return [name for name in self.names if name not in known and not allowed.search(name)]

    def _in_file(self, file: Path) -> dict[str, StoredTensor]:
        if file not in self._tensors:
            self._tensors[file] = stored_tensors(file)
        return self._tensors[file]

    def _stored_name(self, name: str) -> str:
        return name if name in self._files else self._aliases.get(name, name)


class HalvedTable:
    """A source for two processes that both need one table: each reads half of its rows, and they swap.

    Args:
        source: of all weights.
        name: of the table.
        second: whether this process reads the second half.
        swap_rows: sends the rows given first to the other process, and fills those given second with what it
            sends.
    """

    def __init__(
        self,
        source: SafetensorsWeights,
        name: str,
        *,
        second: bool,
        swap_rows: Callable[[Tensor, Tensor], None],
    ) -> None:
        self._source, self._name, self._second, self._swap_rows = source, name, second, swap_rows

    def check(
        self, shapes: Mapping[str, torch.Size], known: Collection[str], ignored: Iterable[str] = ()
    ) -> None:
        """As `SafetensorsWeights.check`."""
        self._source.check(shapes, known, ignored)

    def read(self, name: str, *, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor `name`, as a new tensor on `device` in `dtype`."""
        if name != self._name:
            return self._source.read(name, shape=shape, device=device, dtype=dtype)
        table = torch.empty(shape, device=device, dtype=dtype)
        halves = [rows_of_half(shape[0], second=second) for second in (self._second, not self._second)]
        own, other = (table[rows.start : rows.stop] for rows in halves)
        own.copy_(self._source.read(name, shape=shape, device=device, dtype=dtype, rows=halves[0]))
        self._swap_rows(own, other)
        return table


def rows_of_half(num_rows: int, *, second: bool) -> range:
    """The rows of the first or second half of a table."""
    return range(num_rows // 2, num_rows) if second else range(num_rows // 2)


class RandomWeights:
    """Weights drawn as a new model's: a function of (seed, tensor name, shape) alone.

    They depend neither on rank, device, dtype nor on which of them are read, so that a stage that draws
    only its own has the same.

    Args:
        seed: of the model.
        std: standard deviation of matrices.
        initial_value: gives the vector or number of a name, such as the weight of a norm, or the biases of
            experts, as the model starts it.
        padding_rows: rows set to zero, by tensor name: an embedding's padding token.
    """

    def __init__(
        self,
        seed: int,
        *,
        std: float,
        initial_value: Callable[[str], Tensor],
        padding_rows: Mapping[str, int] | None = None,
    ) -> None:
        self._seed, self._std, self._initial_value = seed, std, initial_value
        self._padding_rows = dict(padding_rows or {})

    def check(
        self, shapes: Mapping[str, torch.Size], known: Collection[str], ignored: Iterable[str] = ()
    ) -> None:
        """Every tensor can be drawn."""

    def read(self, name: str, *, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The tensor `name`, drawn in float32 on the CPU, on `device` in `dtype`."""
        if len(shape) <= 1 or name.endswith("bias"):
            return self._initial_value(name).to(device=device, dtype=dtype)
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
    return float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)


def stored_dtype(directory: Path, config: PreTrainedConfig) -> torch.dtype:
    """What the weights in `directory` are stored in: as the configuration says, or the first of them is."""
    if config.dtype is not None:
        return cast(torch.dtype, config.dtype)
    weights = SafetensorsWeights(directory)
    return DTYPES[weights.stored(weights.names[0]).dtype]


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor is free of NaN and infinity."""
    # Some thirty times faster than `isfinite`, and without a tensor of its size.
    return all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist()))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _settings_of(unread: list[str], known: Collection[str]) -> str:
    """Which keys of a configuration decide whether a model has tensors of such names."""
    layer = re.compile(r".*\blayers\.\d+\.")
    layers = {found[0] for name in known if (found := layer.match(name))}
    keys = {
        "attention_bias": any(re.search(r"attn\.\w+\.bias$", name) for name in unread),
        "mlp_bias": any(re.search(r"mlp\.\w+\.bias$", name) for name in unread),
        "num_hidden_layers": any((found := layer.match(name)) and found[0] not in layers for name in unread),
    }
    return ", ".join([f"`{key}`" for key, found in keys.items() if found] or ["`model_type`"])


def _files_by_tensor(
    directory: Path, in_file: Callable[[Path], Mapping[str, StoredTensor]]
) -> dict[str, Path]:
    index, single = directory / WEIGHTS_INDEX_FILE, directory / WEIGHTS_FILE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: directory / file for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not an index of safetensors shards; {FETCH_AGAIN}") from error
    if single.is_file():
        return dict.fromkeys(in_file(single), single)
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
