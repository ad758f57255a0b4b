"""A pipeline stage: the model with its own decoder layers only, run by the model's own forward pass.

transformers' decoder makes masks and rotary embeddings from `inputs_embeds` and runs its list of layers; a
stage shortens that list and, except at the ends, leaves out embedding, final norm and head. What one stage
hands to the next is one float tensor [B,S,W]: the hidden states and, behind them, the adapters' state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ssmlora_dist.models.families import Family
from ssmlora_dist.models.loss import CausalLMLoss

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class StageLayers:
    """The decoder layers of one stage: from `first` up to, without, `stop`, of `num_layers`."""

    first: int
    stop: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        """Whether the stage holds the embedding."""
        return self.first == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage holds final norm, head and loss."""
        return self.stop == self.num_layers

    def part_names(self, config: PreTrainedConfig, family: Family) -> list[str]:
        """Paths of the parts whose weights the stage needs; a tied head needs the embedding's."""
        tied = config.tie_word_embeddings
        embedding = [family.embedding] if self.is_first or (self.is_last and tied) else []
        layers = [f"{family.layers}.{index}" for index in range(self.first, self.stop)]
        norm = [family.final_norm] if self.is_last else []
        head = [family.output_head] if self.is_last and not tied else []
        return [*embedding, *layers, *norm, *head]


class LayerRange(nn.Module):
    """Consecutive decoder layers under their index in the whole model, as a model's loop wants them."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        for index, layer in layers.items():
            self.add_module(str(index), layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children())

    def __getitem__(self, chosen: Any) -> Any:
        return list(self.children())[chosen]


def cut_to_stage(model: PreTrainedModel, family: Family, stage: StageLayers) -> None:
    """Leaves only what `stage` needs of a model, in place; names stay those of the whole model."""
    decoder: Any = model.get_decoder()
    layers = dict(enumerate(decoder.layers))
    decoder.layers = LayerRange({index: layers[index] for index in range(stage.first, stage.stop)})
    # The decoder counts its layers, and looks their kind up, from 0.
    decoder.config = copy.copy(decoder.config)
    kinds = getattr(decoder.config, "layer_types", None)
    decoder.config.num_hidden_layers = stage.stop - stage.first
    if kinds is not None:
        decoder.config.layer_types = list(kinds[stage.first : stage.stop])
    if not stage.is_first:
        _remove(model, family.embedding)
    if not stage.is_last:
        _remove(model, family.final_norm)
        _remove(model, family.output_head)


class PipelineStage(nn.Module):
    """What one stage computes: from token ids or a received tensor, to a tensor to send, or loss and scores.

    Args:
        model: cut by `cut_to_stage`, adapted or not.
        stage: which layers it holds.
        chunk_size: supervised tokens whose logits exist at a time.
    """

    def __init__(self, model: PreTrainedModel, stage: StageLayers, chunk_size: int) -> None:
        super().__init__()
        self.stage = stage
        self.model = model
        self.loss = CausalLMLoss(model, chunk_size) if stage.is_last else None

    def forward(
        self,
        received_BSW: Tensor | None,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        scored: Tensor | None = None,
    ) -> Any:
        """[B,S,W] for the next stage; at the last one, what `CausalLMLoss` returns.

        Args:
            received_BSW: from the stage before; None at the first.
            input_ids: [B,S]; read by the first stage.
            attention_mask: [B,S]; every stage makes its own masks of it.
            position_ids: [B,S].
            labels: [B,S]; read by the last stage.
            scored: [B,S] bool, to get scores.
        """
        inputs: dict[str, Tensor] = {"attention_mask": attention_mask, "position_ids": position_ids}
        if received_BSW is None:
            inputs["input_ids"] = input_ids
        else:
            inputs["inputs_embeds"] = received_BSW
        if self.loss is not None:
            return self.loss(labels=labels, scored=scored, **inputs)
        decoder: Any = self.model.get_decoder()
        sent_BSW: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        return sent_BSW


def _remove(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
