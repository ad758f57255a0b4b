"""What the state is worth: adapters whose state is replaced by its mean over tokens.

An adapter adds scaling u W_b, and what its state contributes to u is n = u - z (for the paper's form the
normalised state itself). Replaced by its mean over the tokens of some texts, a trained state can still be a
constant, but tell nothing of the token any more: the loss that this costs is what the state is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.ops.form import Drop, Form, Parameters


@dataclass
class StateMeans:
    """Sums over tokens of what each adapter's state contributes, by the adapter's path in the model.

    Attributes:
        sums: float64 [R] each.
        num_tokens: that were seen by each.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, contribution_BSR: Tensor) -> None:
        """Counts the tokens of one pass."""
        total_R = contribution_BSR.double().sum((0, 1))
        self.sums[path] = self.sums[path] + total_R if path in self.sums else total_R
        self.num_tokens[path] = self.num_tokens.get(path, 0) + contribution_BSR.shape[:2].numel()

    def mean(self, path: str) -> Tensor:
        """[R], in float64."""
        return self.sums[path] / self.num_tokens[path]


@contextmanager
def record_states(model: nn.Module) -> Iterator[StateMeans]:
    """Counts every token of every forward pass of `model` in the body, padding too; it computes as ever."""
    means = StateMeans()

    def hook_of(path: str) -> Any:
        @torch.no_grad()
        def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(module, LoRALinear)
            z_BSR, state = module.form_inputs(inputs[0])
            u_BSR, _ = module.form.step(z_BSR, state, module.form_parameters, lambda tensor: tensor)
            means.add(path, u_BSR - z_BSR)

        return observe

    hooks = [module.register_forward_pre_hook(hook_of(path)) for path, module in _stateful(model).items()]
    try:
        yield means
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaced_states(model: nn.Module, means: StateMeans) -> Iterator[None]:
    """Lets every state of `model` be its mean in the body; for all threads, and without gradients.

    Args:
        model: adapted, the same or with the same adapters as the one that `means` was recorded of.
        means: of at least one token.
    """
    forms = {module: (path, module.form) for path, module in _stateful(model).items()}
    try:
        for module, (path, form) in forms.items():
            module.form = _MeanState(rank=form.rank, mean=means.mean(path))
        yield
    finally:
        for module, (_, form) in forms.items():
            module.form = form


def _stateful(model: nn.Module) -> dict[str, LoRALinear]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoRALinear) and module.form.has_state
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _MeanState(Form):
    """u = z + a mean; nothing is received or handed on."""

    name: ClassVar[str] = "mean"
    has_state: ClassVar[bool] = False
    mean: Tensor

    def step(self, z: Tensor, state: Any, parameters: Parameters, drop: Drop) -> tuple[Tensor, None]:
        """See `Form.step`."""
        return z + self.mean.to(z), None
