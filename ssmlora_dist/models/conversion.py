"""Weights that are stored under other names, or in other pieces, than the model has them.

transformers knows how: a list of renamings and conversions for each type of model, such as the experts of a
layer, stored one by one, merged into one tensor. They are applied as the tensors are read, to those of one
tensor of the model at a time. Experts that are stored in MXFP4, as gpt-oss' are, become numbers as they are
read too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.safetensors_file import CODES
from ssmlora_dist.models.weights import SafetensorsWeights, is_finite
from ssmlora_dist.quantization import dequantize_mxfp4

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True)
class Conversion:
    """One conversion: what it is applied to, and what it gives.

    Attributes:
        converter: of transformers.
        target: name of the (first) tensor that it gives.
        sources: the stored tensors, by the converter's pattern that found them, and in its order.
    """

    converter: WeightConverter
    target: str
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def all_sources(self) -> list[str]:
        """The stored tensors of all patterns."""
        return [name for names in self.sources.values() for name in names]

    def apply(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors that it gives, by name in the model.

        Args:
            model: that the weights are for.
            read: gives a stored tensor.
        """
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, read(name))  # type: ignore[arg-type]
        given = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in given.items()}


class Mxfp4(NamedTuple):
    """The two stored tensors of weights in MXFP4, by name: codes [E,O,G,16] and scales [E,O,G]."""

    blocks: str
    scales: str


class ModelWeights(SafetensorsWeights):
    """The checkpoint in a directory, by the names and in the pieces that a model has.

    What a conversion gives beside the tensor asked for is kept until it is asked for in turn.

    Args:
        directory: of the model.
        model: that the weights are for; only names and shapes count.
        aliases: names under which a tensor may be stored instead, where its own is absent.

    Raises:
        ModelError: as for `SafetensorsWeights`.
    """

    def __init__(
        self, directory: Path, model: PreTrainedModel, aliases: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(directory, aliases)
        self._model = model
        self._renamed, self._conversions = _mapping(self.names, model)
        self._ready: dict[str, Tensor] = {}
        names = set(self.names)
        self._packed = {
            name: Mxfp4(f"{name}_blocks", f"{name}_scales")
            for name, tensor in model.state_dict().items()
            if tensor.dim() == 3 and name not in names and f"{name}_blocks" in names
        }
        self._codes = frozenset(chain.from_iterable(self._packed.values()))

    def is_converted(self, name: str) -> bool:
        """Whether no stored tensor is this one as it is."""
        return name in self._conversions or name in self._packed

    def check(
        self, shapes: Mapping[str, torch.Size], known: Collection[str], ignored: Iterable[str] = ()
    ) -> None:
        """As `SafetensorsWeights.check`; conversions are tried on tensors that have shapes alone."""
        direct = {name: shape for name, shape in shapes.items() if not self.is_converted(name)}
        converted = {source for each in self._conversions.values() for source in each.all_sources}
        super().check(direct, {*known, *self._renamed.values(), *converted, *self._codes}, ignored)
        for name in shapes.keys() & self._packed.keys():
            self._check_packed(name, shapes[name])
        tried: dict[str, torch.Size] = {}
        for name in shapes:
            if name in self._conversions and name not in tried:
                given = self._convert(name, self._without_storage)
                tried |= {each: tensor.shape for each, tensor in given.items()}
        for name, shape in tried.items():
            if name in shapes and shape != shapes[name]:
                raise self._unlike(
                    name, f"gives the shape {list(shape)}, where {list(shapes[name])} is needed"
                )

    def read(
        self,
        name: str,
        *,
        shape: torch.Size,
        device: torch.device,
        dtype: torch.dtype,
        rows: range | None = None,
    ) -> Tensor:
        """As `SafetensorsWeights.read`."""
        if name in self._packed:
            assert rows is None, "what is packed is read whole"
            return self._unpacked(name, device=device, dtype=dtype)
        if name not in self._conversions:
            return super().read(name, shape=shape, device=device, dtype=dtype, rows=rows)
        assert rows is None, "a conversion gives whole tensors"

        def read(source: str) -> Tensor:
            stored = self.stored(source).shape
            return super(ModelWeights, self).read(source, shape=stored, device=device, dtype=dtype)

        if name not in self._ready:
            self._ready |= self._convert(name, read)
        tensor = self._ready.pop(name)
        is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        # A view would keep alive what it is a part of.
        return tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)

    def _stored_name(self, name: str) -> str:
        return self._renamed.get(name) or super()._stored_name(name)

    def _check_packed(self, name: str, shape: torch.Size) -> None:
        blocks, scales = map(self._located, self._packed[name])
        num_experts, num_inputs, num_outputs = shape
        expected = [num_experts, num_outputs, num_inputs // 32, 16]
        for tensor, wanted in ((blocks, expected), (scales, expected[:-1])):
            if (tensor.dtype, list(tensor.shape)) != (CODES, wanted):
                raise ModelError(
                    f"{tensor.file}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, where MXFP4 "
                    f"weights of the shape {list(shape)} are stored as {CODES} {wanted}; configuration and "
                    "weights are not of one model, or they are stored quantised in another way: name the "
                    "original model"
                )

    def _unpacked(self, name: str, *, device: torch.device, dtype: torch.dtype) -> Tensor:
        blocks, scales = (self._located(each).read().to(device) for each in self._packed[name])
        tensor = dequantize_mxfp4(blocks, scales, dtype=dtype)
        if not is_finite(tensor):
            raise ModelError(
                f"{self.directory}: {name} is stored as MXFP4 and holds numbers beyond the range of {dtype}; "
                "choose a wider compute dtype or, if it is damaged, fetch the model again"
            )
        return tensor

    def _convert(self, name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        try:
            given = self._conversions[name].apply(self._model, read)
        except ModelError:
            raise
        # The operations are transformers' own, and raise whatever fails in them.
        except Exception as error:
            raise self._unlike(name, " ".join(f"fails: {error}".split())) from error
        if name not in given:
            raise self._unlike(name, f"gives {', '.join(given)} and not this")
        return given

    def _without_storage(self, source: str) -> Tensor:
        return torch.empty(self.stored(source).shape, device="meta")

    def _unlike(self, name: str, problem: str) -> ModelError:
        conversion = self._conversions[name]
        operations = ", ".join(map(repr, conversion.converter.operations))
        return ModelError(
            f"{self.directory}: {name} is made of {len(conversion.all_sources)} stored tensors "
            f"({conversion.all_sources[0]}, ...) by transformers' {operations}, which {problem}; the weights "
            "are not all there, or of another model: fetch them again, or load them with transformers and "
            "save them with save_pretrained(..., save_original_format=False)"
        )


def _mapping(stored: Iterable[str], model: PreTrainedModel) -> tuple[dict[str, str], dict[str, Conversion]]:
    """By names of the model: what is stored under another name, and what is converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    own: dict[str, Any] = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    renamed: dict[str, str] = {}
    conversions: dict[str, Conversion] = {}
    # In this order tensors enter a conversion.
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if target not in own or target == name:
            continue
        if pattern is None:
            renamed[target] = name
            continue
        converter = by_pattern[pattern]
        if target not in conversions:
            conversion = Conversion(converter, target)
            first = converter.target_patterns[0]
            conversions |= {target.replace(first, each): conversion for each in converter.target_patterns}
        conversions[target].sources.setdefault(pattern, []).append(name)
    return renamed, conversions
