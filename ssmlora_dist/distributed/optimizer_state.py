"""The optimiser's moments by parameter name, whole, whichever ZeRO stage holds them (DESIGN section 9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmlora_dist.distributed.pieces import Piece, piece, put_together
from ssmlora_dist.errors import CheckpointError


@dataclass(frozen=True)
class OptimizerState:
    """What an optimiser has learnt of its parameters.

    Attributes:
        num_updates: steps of the optimiser, those that were skipped aside.
        tensors: by kind and parameter name, on the CPU: `{"exp_avg": {name: tensor}}`.
    """

    num_updates: int
    tensors: dict[str, dict[str, Tensor]]


def optimizer_state_pieces(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], zero_stage: int
) -> tuple[int, list[Piece]]:
    """The number of updates, and what this rank holds of the moments of `parameters`.

    At ZeRO 0 that is all of them, on every rank that has these parameters.

    Args:
        optimizer: a DeepSpeed engine's: at ZeRO 0 the optimiser that it was given, else its wrapper.
        parameters: what is trained, by full name.
        zero_stage: 0 to 3.
    """
    base = _base(optimizer, zero_stage)
    if not base.state:
        return 0, []
    num_updates = max(int(state["step"]) for state in base.state.values() if "step" in state)
    if zero_stage == 0:
        return num_updates, [
            piece(name, value, kind=kind)
            for name, parameter in parameters.items()
            for kind, value in base.state.get(parameter, {}).items()
            if torch.is_tensor(value) and kind != "step"
        ]
    if zero_stage < 3:
        # DeepSpeed does so within the first group's first step, when the others have no state yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    flat = _shards(optimizer, zero_stage)[0]
    return num_updates, [
        own
        for kind in _kinds(base.state[flat], flat)
        for name, parameter in parameters.items()
        if (own := _shard_of(parameter, name, kind)) is not None
    ]


def joined_state(collected: Sequence[tuple[int, list[Piece]]]) -> OptimizerState:
    """The state whose pieces, by `optimizer_state_pieces`, are all here; of none at all an empty one."""
    num_updates = max((number for number, _ in collected), default=0)
    return OptimizerState(num_updates, put_together(own for _, pieces in collected for own in pieces))


def parameter_pieces(parameters: Mapping[str, nn.Parameter]) -> list[Piece]:
    """What this rank holds of `parameters`: the whole, or under ZeRO 3 its shard."""
    named: Iterable[tuple[str, Any]] = parameters.items()
    return [
        _zero3_piece(p, name, "", p.ds_tensor) if hasattr(p, "ds_id") else piece(name, p) for name, p in named
    ]


def _shard_of(parameter: Any, name: str, kind: str) -> Piece | None:
    """What this rank holds of a parameter's moment at ZeRO 1 to 3; None: nothing."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_optimizer_state

        return _zero3_piece(parameter, name, kind, safe_get_local_optimizer_state(parameter, kind))
    held = parameter._hp_mapping
    if held is None:
        return None
    begin = held.lp_fragment_address.start
    return piece(name, held.get_hp_fragment(kind), kind=kind, shape=parameter.shape, begin=begin)


def _zero3_piece(parameter: Any, name: str, kind: str, shard: Tensor) -> Piece:
    """This rank's part under ZeRO 3; the last rank's is filled up."""
    begin = dist.get_rank(parameter.ds_process_group) * shard.numel()
    return piece(name, shard, kind=kind, shape=parameter.ds_shape, begin=begin)


def restore_optimizer_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], zero_stage: int, saved: OptimizerState
) -> None:
    """Makes an optimiser that has made no step go on from `saved`; every rank must call it.

    Args:
        optimizer: as for `optimizer_state_pieces`.
        parameters: as for `optimizer_state_pieces`.
        zero_stage: as for `optimizer_state_pieces`.
        saved: of these parameters and maybe others, from any ZeRO stage.

    Raises:
        CheckpointError: they have other shapes, or are of another kind of optimiser.
    """
    if not saved.tensors:
        return
    base = _base(optimizer, zero_stage)
    # torch counts steps in a tensor, bitsandbytes in a number.
    is_torch = isinstance(base, torch.optim.AdamW)
    if is_torch != ("exp_avg" in saved.tensors):
        raise CheckpointError(
            f"training.optimizer: the checkpoint's moments ({', '.join(saved.tensors)}) are those of "
            "another optimiser; set the one it was trained with"
        )

    def count() -> Any:
        return torch.tensor(float(saved.num_updates)) if is_torch else saved.num_updates

    if zero_stage == 0:
        for name, parameter in parameters.items():
            state = {kind: values[name] for kind, values in saved.tensors.items() if name in values}
            if state:
                placed = {kind: _placed(base, parameter, value) for kind, value in state.items()}
                base.state[parameter] = {"step": count(), **placed}
        return
    for kind, values in saved.tensors.items():
        wrong = [n for n, p in parameters.items() if n in values and values[n].numel() != _numel(p)]
        if wrong:
            raise CheckpointError(
                f"training.optimizer: the checkpoint's {kind} of {wrong[0]} is not one number for each "
                "parameter (moments in 8 bits): they resume with parallel.zero_stage=0 alone"
            )
    for flat in _shards(optimizer, zero_stage):
        zeros = {kind: _zeros(base, flat.detach(), flat.dtype) for kind in saved.tensors}
        base.state[flat] = {"step": count(), **zeros}
    if zero_stage < 3:
        optimizer._lazy_init_hp_params_optimizer_state()
    for kind, values in saved.tensors.items():
        for name, parameter in parameters.items():
            if name in values:
                _set_shard(parameter, values[name], kind)


def _base(optimizer: Any, zero_stage: int) -> torch.optim.Optimizer:
    base: torch.optim.Optimizer = optimizer if zero_stage == 0 else optimizer.optimizer
    return base


def _placed(base: torch.optim.Optimizer, parameter: Tensor, value: Tensor) -> Tensor:
    """A moment where the optimiser itself would have put it; others than one for each value as they are."""
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return _zeros(base, parameter, value.dtype).copy_(value)


def _zeros(base: torch.optim.Optimizer, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Moments before the first step; bitsandbytes' paged optimisers page those that are large."""
    if hasattr(base, "get_state_buffer"):
        buffer: Tensor = base.get_state_buffer(parameter, dtype=dtype)
        return buffer
    return torch.zeros_like(parameter, dtype=dtype)


def _shards(optimizer: Any, zero_stage: int) -> list[Tensor]:
    """This rank's flat parts of all parameters, under which the wrapped optimiser keeps its state."""
    flats = (
        optimizer.fp32_partitioned_groups_flat
        if zero_stage == 3
        else optimizer.single_partition_of_fp32_groups
    )
    return list(flats)


def _kinds(state: Mapping[str, Any], flat: Tensor) -> list[str]:
    return [kind for kind, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape]


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _set_shard(parameter: Any, value: Tensor, kind: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(parameter, "ds_id"):
        safe_set_full_optimizer_state(parameter, value, kind)
        return
    # DeepSpeed's own setter for the whole does not know of the zeros that fill the last rank's part.
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(parameter.ds_process_group))
    padded[: value.numel()] = value.flatten()
    rank = dist.get_rank(parameter.ds_process_group)
    safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], kind)
