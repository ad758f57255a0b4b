"""Sequence parallelism: the tokens of a row lie on several ranks, and attention is that of the whole row.

DeepSpeed's Ulysses attention (Jacobs et al. 2023, arXiv 2309.14509): two all-to-all exchanges turn a part of
the tokens with all heads into all tokens with a part of the heads, and back.

Shapes: B rows, H heads, L tokens of a row on one rank, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmlora_dist.distributed.context import DistributedContext


class SequenceGroup:
    """The ranks that share rows.

    Args:
        size: how many; ranks that follow each other.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        rank, number = dist.get_rank(), dist.get_world_size()
        # Every rank takes part in making every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, number, size)]
        self._group = groups[rank // size]

    def attend(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        module: nn.Module,
        query_BHLD: Tensor,
        key_BHLD: Tensor,
        value_BHLD: Tensor,
    ) -> Tensor:
        """[B,L,H,D] of this rank's tokens, by `attend` [B,S,H,D] on all tokens and some of the heads.

        Args:
            attend: attention of whole rows.
            module: that attends; its heads are those that it is called with.
            query_BHLD: of this rank's tokens.
            key_BHLD: alike; fewer heads than ranks are repeated.
            value_BHLD: alike.
        """
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        def core(_: nn.Module, *whole: Any, **__: Any) -> tuple[Tensor, None]:
            return attend(*whole[:3]), None

        rows, heads, _, size = query_BHLD.shape
        ulysses = UlyssesSPAttentionHF(
            attn=core,
            batch_size=rows,
            attn_head_count=heads,
            attn_head_size=size,
            kv_head_count=key_BHLD.shape[1],
            num_hidden_layers=1,
            process_group=self._group,
            seq_length_is_variable=True,
        )
        groups = getattr(module, "num_key_value_groups", None)
        # It gathers the positions, which nobody reads here.
        positions = torch.zeros(rows, 1, dtype=torch.int64, device=query_BHLD.device)
        try:
            output, _ = ulysses(module, query_BHLD, key_BHLD, value_BHLD, None, position_ids=positions)
        finally:
            # Ulysses changes it where it repeats heads.
            if groups is not None:
                module.num_key_value_groups = groups  # type: ignore[assignment]
        return output.unflatten(-1, (heads, size))  # type: ignore[no-any-return]

    def join(self, results: Sequence[Any], context: DistributedContext) -> list[Any]:
        """Scores of whole rows, from each rank's of its tokens: sums, counts, and whether all were exact.

        Args:
            results: of every batch.
            context: the run's processes, all of which call it.
        """
        mine = [torch.stack([part.double().cpu() for part in scores]) for scores in results]
        gathered = context.gather(mine)
        first = context.rank // self.size * self.size
        joined = []
        for scores, *parts in zip(results, *gathered[first : first + self.size], strict=True):
            loss_sums, num_targets, _ = torch.stack(parts).sum(0)
            exact = torch.stack(parts)[:, 2].amin(0) == 1
            joined.append(type(scores)(loss_sums.to(scores[0].dtype), num_targets.to(scores[1].dtype), exact))
        return joined
