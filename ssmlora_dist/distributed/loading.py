"""What ranks do together while the backbone is loaded: shard it under ZeRO 3, swap halves of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def zero3_partitioner(config: dict[str, Any]) -> Callable[[nn.Module], None]:
    """Makes a function that leaves of a module's parameters this rank's shards: the whole ones are released.

    All ranks call it with the same modules in the same order. The engine takes what is partitioned as it is,
    and partitions what is added later, such as adapters.

    Args:
        config: DeepSpeed's dictionary (`ds_config.deepspeed_config`) with ZeRO stage 3.
    """
    import deepspeed

    partitioned: list[Any] = []

    def partition(part: nn.Module) -> None:
        if partitioned:
            # Made anew, DeepSpeed's object would start process groups anew where the configuration has any.
            partitioned[0].convert_to_zero_parameters(list(part.parameters()))
        else:
            deepspeed.zero.Init(module=part, config_dict_or_path=config)
            partitioned.extend(part.parameters())

    return partition


def swap_rows(peer: int, own: Tensor, other: Tensor) -> None:
    """Sends `own` to rank `peer`, and fills `other` with what that rank sends; both are contiguous."""
    if dist.get_rank() < peer:
        dist.send(own, peer)
        dist.recv(other, peer)
    else:
        # The other way round: two that send first would wait for each other.
        dist.recv(other, peer)
        dist.send(own, peer)
