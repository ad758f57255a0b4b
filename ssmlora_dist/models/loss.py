"""Cross-entropy and exact match from hidden states, in chunks: the logits of a long input never exist whole.

Shapes: B batch, S tokens, D hidden size, N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmlora_dist.adapters.saved import SavedModule
from ssmlora_dist.batches import Batch
from ssmlora_dist.errors import ModelError
from ssmlora_dist.models.attention import rows_of, segment_attention
from ssmlora_dist.models.recompute import note_layer, run_layers
from ssmlora_dist.models.structure import decoder_layers
from ssmlora_dist.quantization import keep_weights_of_recompute

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPARED_WORDS = 7
# Float32 logits of several units; one product either way, so that no more than rounding may differ.
HEAD_TOLERANCE = 1e-5


def checkpoint_layers(
    model: PreTrainedModel, num_kept: int = 0, layers_per_checkpoint: int = 1, offload: bool = False
) -> None:
    """Recomputes decoder layers in the backward pass instead of keeping their activations.

    Non-reentrant, with hidden states and adapter state as the explicit inputs and outputs of a checkpoint.

    Args:
        model: adapted.
        num_kept: how many layers, the last ones, keep their activations.
        layers_per_checkpoint: how many consecutive layers share a checkpoint and are recomputed together;
            the last ones may be fewer.
        offload: keep the inputs of checkpoints in host memory.

    Raises:
        ModelError: its layers are not made to be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = list(decoder_layers(model).values())
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise ModelError(
            f"model: the decoder layers of {model.config.model_type} models are not made to be recomputed "
            "(transformers' GradientCheckpointingLayer); set training.gradient_checkpointing to false"
        )
    recomputed = layers[: max(0, len(layers) - num_kept)]
    run = partial(run_layers, offload=offload)
    for position, layer in enumerate(recomputed, 1):
        shares = position % layers_per_checkpoint and position < len(recomputed)
        keep_weights_of_recompute(layer)
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = note_layer if shares else run  # type: ignore[assignment]


class Scores(NamedTuple):
    """Of a batch of sequences: loss sums [B] float32 in nats, target counts [B], exact matches [B] bool."""

    loss_sums: Tensor
    num_targets: Tensor
    exact: Tensor


class ChunkedHead(nn.Module):
    """The output head and the cross-entropy behind it, a chunk of tokens at a time.

    A module of its own, entered once in every forward pass however many chunks there are: ZeRO 3 gathers the
    weight when the module is entered, which every rank must do equally often, whatever its rows hold.

    Args:
        head: the model's output head; None where it is given logits, not hidden states.
        chunk_size: supervised tokens whose logits exist at a time.
        logit_cap: bound of the logits, for models that have one.
    """

    def __init__(self, head: nn.Linear | None, chunk_size: int, logit_cap: float | None = None) -> None:
        super().__init__()
        # In a tuple, so that its weight keeps one name: that in the model.
        self._head = (head,)
        self.chunk_size = chunk_size
        self.logit_cap = logit_cap

    def forward(self, hidden_ND: Tensor, targets_N: Tensor, per_token: bool = False) -> Any:
        """Sum of the cross-entropies, a float32 scalar; of each token its own with `per_token`.

        Args:
            hidden_ND: what the head is applied to; without one, logits [N,V].
            targets_N: the true tokens.
            per_token: return the cross-entropies [N] float32 and whether the arg-max is another token, [N]
                bool, to be called without gradients.
        """
        head: Any = self._head[0]
        if isinstance(head, SavedModule) and head.is_disabled:
            head = head.base_layer
        weight_VD, bias_V = (None, None) if head is None else (head.weight, head.bias)
        chunks = zip(hidden_ND.split(self.chunk_size), targets_N.split(self.chunk_size), strict=True)
        if not per_token:
            total = hidden_ND[:0].sum(dtype=torch.float32)
            for hidden_CD, targets_C in chunks:
                total = total + checkpoint(
                    self._loss, hidden_CD, targets_C, weight_VD, bias_V, use_reentrant=False
                )
            return total
        losses, misses = [], []
        for hidden_CD, targets_C in chunks:
            logits_CV = self.logits(hidden_CD, weight_VD, bias_V)
            losses.append(F.cross_entropy(logits_CV, targets_C, reduction="none"))
            misses.append(logits_CV.argmax(-1) != targets_C)
        return torch.cat(losses), torch.cat(misses)

    def logits(self, hidden_CD: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None) -> Tensor:
        """[C,V] in float32."""
        if weight_VD is None:
            return hidden_CD.float()
        # A head that is trained is wider than what it multiplies.
        dtype, cap = hidden_CD.dtype, self.logit_cap
        logits_CV = F.linear(hidden_CD, weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype))
        return (logits_CV if cap is None else torch.tanh(logits_CV / cap) * cap).float()

    def _loss(
        self, hidden_CD: Tensor, targets_C: Tensor, weight_VD: Tensor | None, bias_V: Tensor | None
    ) -> Tensor:
        return F.cross_entropy(self.logits(hidden_CD, weight_VD, bias_V), targets_C, reduction="sum")


class CausalLMLoss(nn.Module):
    """A causal language model whose output is its loss, or its scores.

    Both go through `forward`, the one call that DeepSpeed's hooks see. The head is applied in chunks where
    that gives the model's own logits; where the model does more to them, they are its own, which exist all at
    once for the positions of the batch that have a target.

    Args:
        model: a transformers causal language model.
        chunk_size: supervised tokens whose logits exist at a time.

    Attributes:
        uses_own_logits: whether the model makes its logits itself.
    """

    def __init__(self, model: PreTrainedModel, chunk_size: int) -> None:
        super().__init__()
        self.model = model
        segment_attention(model)
        logit_cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self.uses_own_logits = not _is_the_models_own(model, logit_cap)
        head: Any = None if self.uses_own_logits else model.get_output_embeddings()
        self.head = ChunkedHead(head, chunk_size, logit_cap)

    def forward(self, batch: Batch) -> Any:
        """Sum of the cross-entropies of the supervised tokens, a float32 scalar, in nats.

        `Scores` without gradients for a batch that says what is scored.
        """
        with rows_of(batch, self.model) as inputs:
            return self.of(batch, inputs)

    def of(self, batch: Batch, inputs: Mapping[str, Any]) -> Any:
        """The same for inputs of the decoder other than the batch's, within `rows_of`."""
        if batch.scored is not None:
            with torch.no_grad():
                return self._scores(batch, batch.scored, inputs)
        return self.head(self._supervised(batch, inputs), batch.targets)

    def _scores(self, batch: Batch, scored_N: Tensor, inputs: Mapping[str, Any]) -> Scores:
        loss_N, missed_N = self.head(self._supervised(batch, inputs), batch.targets, per_token=True)
        num_rows, num_tokens = batch.shape
        rows_N = batch.places // num_tokens
        zeros_B = rows_N.new_zeros(num_rows)
        return Scores(
            loss_sums=loss_N.new_zeros(num_rows).index_add_(0, rows_N, loss_N),
            num_targets=zeros_B.index_add(0, rows_N, torch.ones_like(rows_N)),
            exact=zeros_B.index_add(0, rows_N, (missed_N & scored_N).long()) == 0,
        )

    def _supervised(self, batch: Batch, inputs: Mapping[str, Any]) -> Tensor:
        """What the head is given for each target, [N,D], or its logits [N,V]."""
        if self.uses_own_logits:
            logits_BKV = self.model(**inputs, use_cache=False, logits_to_keep=batch.columns).logits
            return logits_BKV.flatten(0, 1).index_select(0, batch.column_places)
        hidden_BSD = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        return hidden_BSD.flatten(0, 1).index_select(0, batch.places)


class _PassThrough(nn.Module):
    """In the place of a decoder: gives back what it is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


def _is_the_models_own(model: PreTrainedModel, logit_cap: float | None) -> bool:
    """Whether `ChunkedHead` makes of hidden states the logits that the model makes of them.

    Compared on drawn hidden states and a copy of the model that has a small head and no layers, so that no
    weight is needed: it may be a stage, quantised, sharded, without storage, or in use by other threads.
    """
    own: Any = model.get_output_embeddings()
    plain = own.base_layer if isinstance(own, SavedModule) else own
    if type(plain) is not nn.Linear or own._forward_hooks or own._forward_pre_hooks:
        return False
    # Put into the instance, `forward` would be that of the model also in a copy.
    if "forward" in vars(model):
        return False
    generator = torch.Generator().manual_seed(0)
    head = nn.utils.skip_init(nn.Linear, own.in_features, COMPARED_WORDS, bias=own.bias is not None)
    with torch.no_grad():
        for parameter in head.parameters():
            # Logits of several units: large enough for a cap to bend them.
            parameter.normal_(0, 8 * own.in_features**-0.5, generator=generator)
        hidden_BSD = torch.randn(1, 3, own.in_features, generator=generator)
        wanted_BSV = ChunkedHead(head, 1, logit_cap).logits(hidden_BSD, head.weight, head.bias)
        names = [name for name, module in model.named_children() if module is own]
        reduced = copy.copy(model)
        reduced._modules = {
            **model._modules,
            model.base_model_prefix: _PassThrough(),
            **dict.fromkeys(names, head),
        }
        try:
            found_BSV = reduced(inputs_embeds=hidden_BSD, use_cache=False).logits.float()
        # Whatever keeps the two from being compared, the model's own logits are right.
        except Exception:
            return False
    same_shape = found_BSV.shape == wanted_BSV.shape
    return same_shape and torch.allclose(found_BSV, wanted_BSV, rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE)
