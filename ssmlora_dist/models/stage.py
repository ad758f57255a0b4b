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

from ssmlora_dist.adapters.state import join_stages
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

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for index, layer in layers.items():
            self.add_module(index, layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.children())

    def __getitem__(self, chosen: Any) -> Any:
        return list(self.children())[chosen]


def cut_to_stage(model: PreTrainedModel, family: Family, stage: StageLayers) -> None:
    """Leaves only what `stage` needs of a model, in place; names stay those of the whole model."""
    _keep_layers(model.get_decoder(), slice(stage.first, stage.stop))
    if not stage.is_first:
        _remove(model, family.embedding)
    if not stage.is_last:
        _remove(model, family.final_norm)
        _remove(model, family.output_head)


class PipelineStage(nn.Module):
    """What one stage computes: from token ids or a received tensor, to a tensor to send, or loss and scores.

    Attributes:
        boundary_width: W of the tensor [B,S,W] between stages.

    Args:
        model: cut by `cut_to_stage`, adapted or not.
        stage: which layers it holds.
        chunk_size: supervised tokens whose logits exist at a time.
        num_ahead: of its layers, how many, the last ones, `finish` runs; None: all.
    """

    def __init__(
        self, model: PreTrainedModel, stage: StageLayers, chunk_size: int, num_ahead: int | None = None
    ) -> None:
        super().__init__()
        self.stage = stage
        self.model = model
        self.loss = CausalLMLoss(model, chunk_size) if stage.is_last else None
        # In a tuple, so that what they share with the model keeps one name. The loss runs the decoder whole.
        self._decoders = _in_two(model.get_decoder(), None if stage.is_last else num_ahead)
        last = len(self._decoders) - 1
        for index, decoder in enumerate(self._decoders):
            self.boundary_width = join_stages(
                decoder.layers,
                decoder.config.hidden_size,
                is_first=stage.is_first and index == 0,
                is_last=stage.is_last and index == last,
            )

    def forward(
        self, received_BSW: Tensor | None, *, labels: Tensor, scored: Tensor | None = None, **inputs: Tensor
    ) -> Any:
        """[B,S,W] for the next stage; at the last one, what `CausalLMLoss` returns.

        Args:
            received_BSW: from the stage before; None at the first.
            labels: [B,S]; read by the last stage.
            scored: [B,S] bool, to get scores.
            inputs: `input_ids`, read by the first stage, `attention_mask`, of which every stage makes its own
                masks, and `position_ids`, each [B,S]; `dropout_seeds`, [B] int64, read by every stage.
        """
        if self.loss is not None:
            return self.loss(labels=labels, scored=scored, **_entering(received_BSW, inputs))
        return self.finish(self.begin(received_BSW, **inputs), **inputs)

    def begin(self, received_BSW: Tensor | None, **inputs: Tensor) -> Tensor | None:
        """[B,S,W] for `finish`, from the layers before its own; what was received, if it runs all."""
        if len(self._decoders) == 1:
            return received_BSW
        return _run(self._decoders[0], received_BSW, inputs)

    def finish(self, begun_BSW: Tensor | None, **inputs: Tensor) -> Tensor:
        """[B,S,W] for the next stage, from what `begin` has returned."""
        return _run(self._decoders[-1], begun_BSW, inputs)


def _run(decoder: Any, entering_BSW: Tensor | None, inputs: dict[str, Tensor]) -> Tensor:
    leaving_BSW: Tensor = decoder(**_entering(entering_BSW, inputs), use_cache=False).last_hidden_state
    return leaving_BSW


def _entering(entering_BSW: Tensor | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A decoder's inputs: token ids, or in their place a tensor that another one has sent."""
    if entering_BSW is None:
        return inputs
    rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    return {**rest, "inputs_embeds": entering_BSW}


def _in_two(decoder: Any, num_ahead: int | None) -> tuple[Any, ...]:
    """The decoder without its last `num_ahead` layers, and with these alone; itself if that leaves none."""
    number = len(decoder.layers)
    if num_ahead is None or not 0 < num_ahead < number:
        return (decoder,)
    halves = []
    for kept in (slice(0, number - num_ahead), slice(number - num_ahead, number)):
        half = copy.copy(decoder)
        half._modules = dict(decoder._modules)
        _keep_layers(half, kept)
        halves.append(half)
    return tuple(halves)


def _keep_layers(decoder: Any, kept: slice) -> None:
    decoder.layers = LayerRange(dict(list(decoder.layers.named_children())[kept]))
    # The decoder counts its layers, and looks their kind up, from 0.
    decoder.config = copy.copy(decoder.config)
    decoder.config.num_hidden_layers = len(decoder.layers)
    kinds = getattr(decoder.config, "layer_types", None)
    if kinds is not None:
        decoder.config.layer_types = list(kinds[kept])


def _remove(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
