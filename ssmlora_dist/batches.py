"""The batch that the loader makes once, for every topology.

Nothing behind it shifts labels, counts, or looks into a tensor on the device to decide what to do.

Shapes: B rows, S tokens of a row, N tokens with a loss, K columns that hold any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED_LABEL = -100

Lengths = tuple[tuple[int, ...], ...]
"""Of the samples of each row, in order, without the padding behind them."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What goes through the model at a time.

    Attributes:
        inputs: of the decoder: `input_ids` and `position_ids` [B,S] int64, the latter from 0 in every sample;
            `dropout_seeds` [B,S] int32 where something is dropped. Rows are padded behind.
        targets: tokens with a loss, [N] int64, in the order of rows and positions.
        places: b S + t of the position t that predicts each of them, [N] int64.
        columns: the t among `places`, each once, ascending, [K] int64.
        column_places: b K + k of the column k of each place, [N] int64.
        lengths: of the samples of each row if any row holds several; None: one sample a row.
        num_padding: tokens that are no sample's.
        scored: which targets count for the exact match, [N] bool; None: scores are not asked for.
        num_shards: of how many ranks this one has a part of each row; `lengths` are of the whole rows.
    """

    inputs: Mapping[str, Tensor]
    targets: Tensor
    places: Tensor
    columns: Tensor
    column_places: Tensor
    lengths: Lengths | None = None
    num_padding: int = 0
    scored: Tensor | None = None
    num_shards: int = 1

    @classmethod
    def of(
        cls,
        labels: Tensor,
        *,
        lengths: Lengths | None = None,
        num_padding: int = 0,
        scored: Tensor | None = None,
        **inputs: Tensor,
    ) -> Batch:
        """From labels, which are shifted here.

        Args:
            labels: [B,S] int64 on the CPU, the token itself where it has a loss, `IGNORED_LABEL` elsewhere,
                as in the first token of every sample.
            lengths: see the class.
            num_padding: see the class.
            scored: [B,S] bool, which tokens with a loss count for the exact match.
            inputs: see the class.
        """
        shifted_BS = labels[:, 1:]
        mask_BS = shifted_BS != IGNORED_LABEL
        rows_N, positions_N = mask_BS.nonzero(as_tuple=True)
        columns_K, columns_N = positions_N.unique(return_inverse=True)
        return cls(
            inputs,
            targets=shifted_BS[mask_BS],
            places=rows_N * labels.shape[1] + positions_N,
            columns=columns_K,
            column_places=rows_N * len(columns_K) + columns_N,
            lengths=lengths,
            num_padding=num_padding,
            scored=None if scored is None else scored[:, 1:][mask_BS],
        )

    @property
    def shape(self) -> tuple[int, int]:
        """B and S."""
        rows, tokens, *_ = next(iter(self.inputs.values())).shape
        return rows, tokens

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding included."""
        rows, tokens = self.shape
        return rows * tokens

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.targets)

    def shard(self, rank: int, number: int) -> Batch:
        """The part of each row that one of `number` ranks computes; S must be a multiple of their number."""
        tokens = self.shape[1]
        size = tokens // number
        assert size * number == tokens, "padded by the loader"
        begin = rank * size
        positions_N = self.places % tokens
        chosen_N = (positions_N >= begin) & (positions_N < begin + size)
        rows_N, own_N = (self.places // tokens)[chosen_N], positions_N[chosen_N] - begin
        columns_K, columns_N = own_N.unique(return_inverse=True)
        return replace(
            self,
            inputs={name: tensor[:, begin : begin + size] for name, tensor in self.inputs.items()},
            targets=self.targets[chosen_N],
            places=rows_N * size + own_N,
            columns=columns_K,
            column_places=rows_N * len(columns_K) + columns_N,
            num_padding=self.num_padding if rank == 0 else 0,
            scored=None if self.scored is None else self.scored[chosen_N],
            num_shards=number,
        )

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on `device`, to which they are on their way: see `upload`."""
        return replace(
            self,
            inputs={name: upload(tensor, device) for name, tensor in self.inputs.items()},
            targets=upload(self.targets, device),
            places=upload(self.places, device),
            columns=upload(self.columns, device),
            column_places=upload(self.column_places, device),
            scored=None if self.scored is None else upload(self.scored, device),
        )


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on `device`. Nobody waits for a GPU: it copies from pinned memory when it gets there."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def count(batches: Sequence[Batch]) -> list[int]:
    """Of some batches, the tokens with a loss, the tokens computed, and of these the padding."""
    return [
        sum(batch.num_targets for batch in batches),
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_padding for batch in batches),
    ]
