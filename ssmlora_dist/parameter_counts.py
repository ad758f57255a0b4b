"""How many of a model's parameters are trained, and how many there are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ssmlora_dist.quantization import QuantizedExperts


@dataclass(frozen=True)
class TrainableParameters:
    """How much of a model is trained; as text, the line that PEFT prints.

    Attributes:
        by_name: numbers of the trainable parameters, by full name.
        total: number of all parameters, trained or not; quantised ones by the numbers that they stand for.
    """

    by_name: dict[str, int]
    total: int

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(self.by_name.values())

    def __str__(self) -> str:
        percent = 100 * self.trainable / self.total if self.total else 0.0
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {percent:.4f}"
        )


def trainable_parameters(model: nn.Module) -> TrainableParameters:
    """Counts what of `model` is trained, and all of it; inactive adapters do not count."""
    by_name: dict[str, int] = {}
    total = 0
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            count = _number_of(module, name, parameter)
            total += count
            if parameter.requires_grad:
                by_name[f"{path}.{name}" if path else name] = count
    return TrainableParameters(by_name, total)


def _number_of(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    if isinstance(module, nn.Linear) and name == "weight":
        # Packed in 4 bits there are fewer elements.
        return module.in_features * module.out_features
    if isinstance(module, QuantizedExperts) and name in module.shapes:
        return module.shapes[name].numel()
    # Under ZeRO 3 the parameter itself is empty.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
