"""Inputs of one time module, run through the fused functions and the reference, for the tests of `ops`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ssmlora_dist.ops import fused
from ssmlora_dist.ops.dropout import Dropout, keep_mask
from ssmlora_dist.ops.ssmlora import SSMLoRA, reference
from ssmlora_dist.ops.ssmlora.state_step import Recurrence
from tests.ops.ssmlora.recurrence import weights_like

SEED = 17
BATCH, FEATURES, OUT_FEATURES, SCALING, DROPOUT_ID, DROPOUT = 2, 24, 20, 1.5, 5, 0.3
# Of the samples in the two rows.
DROPOUT_SEEDS = [2**40 + 7, 3]
# Both sides sum the same terms in other orders; errors are relative to the largest number of a tensor. In
# bfloat16 they also round at other places, each time by up to 2^-9, and a gradient through minmax sees some.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Inputs:
    """Of one time module; all but the frozen weight and the seeds take gradients."""

    x_BSD: Tensor
    h_prev_BSR: Tensor
    lora_A_RD: Tensor
    lora_B_OR: Tensor
    transition_RR: Tensor
    input_RR: Tensor
    frozen_OD: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(value for value in vars(self).values() if value is not self.frozen_OD)

    def copy(self, device: str | None = None) -> Inputs:
        """The same numbers without a graph."""
        copied = {name: value.detach().to(device, copy=True) for name, value in vars(self).items()}
        for name, value in copied.items():
            value.requires_grad_(name != "frozen_OD")
        return Inputs(**copied)


def draw(tokens: int = 5, rank: int = 4, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> Inputs:
    print(f"seed {SEED}")
    generator = torch.Generator().manual_seed(SEED)
    parameter_dtype = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, scale: float = 1.0, to: torch.dtype = parameter_dtype) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(to)

    return Inputs(
        normal(batch, tokens, FEATURES, to=dtype),
        normal(batch, tokens, rank, to=dtype),
        normal(rank, FEATURES, scale=FEATURES**-0.5),
        normal(OUT_FEATURES, rank, scale=rank**-0.5),
        normal(rank, rank, scale=0.5 * rank**-0.5),
        normal(rank, rank, scale=0.7 * rank**-0.5),
        normal(OUT_FEATURES, FEATURES, scale=FEATURES**-0.5, to=dtype),
    ).copy()


def run_fused(
    inputs: Inputs, recurrence: Recurrence, detach: bool = False, seeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x_BSD, (z_BSR,) = fused.down_project(inputs.x_BSD, [inputs.lora_A_RD])
    y_BSO, carried_BSR = fused.add_delta(
        F.linear(x_BSD, inputs.frozen_OD),
        z_BSR,
        inputs.h_prev_BSR.detach() if detach else inputs.h_prev_BSR,
        inputs.lora_B_OR,
        *settings_of(inputs, recurrence),
        seeds,
        Dropout(recurrence.dropout_id, recurrence.dropout),
    )
    assert carried_BSR is not None
    return y_BSO, carried_BSR


def settings_of(inputs: Inputs, recurrence: Recurrence) -> tuple[SSMLoRA, dict[str, Tensor], float]:
    """The form, its parameters and scaling."""
    form = SSMLoRA(rank=len(inputs.input_RR), normalization=recurrence.normalization, carry=recurrence.carry)
    parameters = {"state_transition": inputs.transition_RR, "state_input": inputs.input_RR}
    return form, parameters, recurrence.scaling


def run_reference(
    inputs: Inputs, recurrence: Recurrence, detach: bool = False, seeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    mask_BSR = None
    if seeds is not None:
        kept = keep_mask(seeds, recurrence.dropout_id, inputs.h_prev_BSR.shape[-1], recurrence.dropout)
        mask_BSR = kept.to(inputs.lora_A_RD.dtype) / (1 - recurrence.dropout)
    y_BSO, carried_BSR = reference.time_module(
        inputs.x_BSD,
        F.linear(inputs.x_BSD, inputs.frozen_OD),
        inputs.h_prev_BSR,
        inputs.lora_A_RD,
        inputs.lora_B_OR,
        inputs.transition_RR,
        inputs.input_RR,
        scaling=recurrence.scaling,
        normalization=recurrence.normalization,
        carry=recurrence.carry,
        detach_state=detach,
        dropout_mask_BSR=mask_BSR,
    )
    return y_BSO, carried_BSR.to(inputs.h_prev_BSR.dtype)


def outputs_and_gradients(run: Callable[..., Any], inputs: Inputs, *options: Any) -> list[Tensor | None]:
    inputs = inputs.copy()
    outputs = run(inputs, *options)
    gradients = torch.autograd.grad(
        outputs,
        inputs.leaves,
        [weights_like(output).to(output.device) for output in outputs],
        allow_unused=True,
    )
    return [*(output.detach() for output in outputs), *gradients]


NAMES = ("y", "carried", "x", "h_prev", "lora_A", "lora_B", "state_transition", "state_input")


def assert_same(got: Sequence[Tensor | None], wanted: Sequence[Tensor | None], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is None or b is None:
            continue
        assert a.dtype == b.dtype, name
        largest = b.abs().max().double().clamp(min=torch.finfo(torch.float32).tiny)
        error = ((a.double() - b.double()).abs().max() / largest).item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_is_the_reference(inputs: Inputs, recurrence: Recurrence, *options: Any) -> None:
    got = outputs_and_gradients(run_fused, inputs, recurrence, *options)
    wanted = outputs_and_gradients(run_reference, inputs, recurrence, *options)
    assert_same(got, wanted, TOLERANCES[inputs.x_BSD.dtype])


def kept_by(run: Callable[[], Any], *apart_from: Tensor) -> list[Tensor]:
    """Tensors that the graph of `run` holds, one for each storage."""
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known:
            kept[pointer] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return list(kept.values())
