"""Cross-entropy and exact match from hidden states, in chunks: the logits of a long input never exist whole.

Shapes: B batch, S tokens, D hidden size, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmlora_dist.models.families import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED_LABEL = -100


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Recomputes each decoder layer in the backward pass instead of keeping its activations.

    Non-reentrant, with hidden states and adapter state as the explicit inputs and outputs of a layer.
    """
    for layer in decoder_layers(model):
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]


class Scores(NamedTuple):
    """Of a batch of sequences: loss sums [B] float32 in nats, target counts [B], exact matches [B] bool."""

    loss_sums: Tensor
    num_targets: Tensor
    exact: Tensor


class CausalLMLoss(nn.Module):
    """A causal language model whose output is its loss, or its scores.

    Both go through `forward`, the one call that DeepSpeed's hooks see.

    Args:
        model: a transformers causal language model of a supported family.
        chunk_size: supervised tokens whose logits exist at a time.
    """

    def __init__(self, model: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_size = chunk_size

    def forward(self, labels: Tensor, scored: Tensor | None = None, **inputs: Tensor) -> Any:
        """Sum of the cross-entropies of the supervised tokens, a float32 scalar, in nats.

        Args:
            labels: [B,S], -100 where there is no loss; token t is predicted from the tokens before it.
            scored: [B,S] bool; when given, `Scores` are returned instead, without gradients: which of the
                supervised tokens count for the exact match.
            inputs: `input_ids`, `attention_mask`, `position_ids`, each [B,S].
        """
        if scored is not None:
            with torch.no_grad():
                return self._scores(labels, scored, inputs)
        hidden_ND, targets_N, _ = self._supervised(labels, inputs)
        total = hidden_ND[:0].sum(dtype=torch.float32)
        for hidden_CD, targets_C in self._chunks(hidden_ND, targets_N):
            total = total + checkpoint(self._chunk_loss, hidden_CD, targets_C, use_reentrant=False)
        return total

    def _scores(self, labels: Tensor, scored: Tensor, inputs: dict[str, Tensor]) -> Scores:
        hidden_ND, targets_N, rows_N = self._supervised(labels, inputs)
        scored_N = scored[:, 1:][labels[:, 1:] != IGNORED_LABEL]
        loss_N = hidden_ND.new_zeros(len(targets_N), dtype=torch.float32)
        wrong_N = torch.zeros_like(targets_N)
        start = 0
        for hidden_CD, targets_C in self._chunks(hidden_ND, targets_N):
            logits_CV, chunk = self._logits(hidden_CD), slice(start, start + len(targets_C))
            loss_N[chunk] = F.cross_entropy(logits_CV, targets_C, reduction="none")
            wrong_N[chunk] = (logits_CV.argmax(-1) != targets_C) & scored_N[chunk]
            start = chunk.stop
        num_rows = labels.shape[0]
        return Scores(
            loss_sums=loss_N.new_zeros(num_rows).index_add_(0, rows_N, loss_N),
            num_targets=torch.bincount(rows_N, minlength=num_rows),
            exact=wrong_N.new_zeros(num_rows).index_add_(0, rows_N, wrong_N) == 0,
        )

    def _supervised(self, labels: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        decoder: Any = self.model.get_decoder()  # type: ignore[operator]
        hidden_BSD = decoder(**inputs, use_cache=False).last_hidden_state
        mask_BS = labels[:, 1:] != IGNORED_LABEL
        return hidden_BSD[:, :-1][mask_BS], labels[:, 1:][mask_BS], mask_BS.nonzero()[:, 0]

    def _chunks(self, hidden_ND: Tensor, targets_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        if len(targets_N):
            yield from zip(hidden_ND.split(self.chunk_size), targets_N.split(self.chunk_size), strict=True)

    def _logits(self, hidden_CD: Tensor) -> Tensor:
        logits_CV = self.model.lm_head(hidden_CD)  # type: ignore[operator]
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return (logits_CV if cap is None else torch.tanh(logits_CV / cap) * cap).float()

    def _chunk_loss(self, hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden_CD), targets_C, reduction="sum")
