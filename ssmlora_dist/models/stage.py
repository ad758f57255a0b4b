"""A pipeline stage: the model with its own decoder layers only, run by the model's own forward pass.

transformers' decoder makes masks and rotary embeddings from `inputs_embeds` and runs its list of layers; a
stage shortens that list and, except at the ends, leaves out embedding, final norm and head. What one stage
hands to the next is one float tensor [B,S,W]: the hidden states and, behind them, the adapters' state. It is
given to the first layer itself and taken from the last one: what a decoder does around its layers - scaling
embeddings, adding positions, norms - is done by the stages that begin and end the model, and by no other.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ssmlora_dist.adapters.state import join_stages
from ssmlora_dist.batches import Batch
from ssmlora_dist.models.attention import rows_of, segment_attention
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.models.structure import Structure, keep_structure, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    def part_names(self, structure: Structure) -> list[str]:
        """Paths of the parts whose weights the stage needs, in the order of the forward pass.

        A head that is tied to the embedding has no weights of its own, and needs the embedding's.
        """
        tied = structure.tied
        embedding = [structure.embedding] if self.is_first or (self.is_last and tied) else []
        before = structure.before if self.is_first else ()
        layers = [f"{structure.layers}.{index}" for index in range(self.first, self.stop)]
        after = structure.after if self.is_last else ()
        head = [structure.output_head] if self.is_last and not tied else []
        return [*embedding, *before, *structure.everywhere, *layers, *after, *head]


class _BoundaryTensors(threading.local):
    """The tensors [B,S,W] at the ends of the layers that run in this thread."""

    received: Tensor | None = None
    sent: Tensor | None = None


_boundary = _BoundaryTensors()


class _BoundaryLayer:
    """In the place of the first or last layer in the loop of a decoder, which sees the layer's attributes.

    Args:
        layer: that is called.
        receives: its input is what the stage has received, whatever the decoder has made of that.
        sends: its output is what the stage sends; the decoder goes on with the hidden states in it.
        hidden_size: D.
    """

    def __init__(self, layer: nn.Module, receives: bool, sends: bool, hidden_size: int) -> None:
        self._layer, self._receives, self._sends = layer, receives, sends
        self._hidden_size = hidden_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, hidden_BSD: Any, *args: Any, **kwargs: Any) -> Any:
        if self._receives and _boundary.received is not None:
            hidden_BSD, _boundary.received = _boundary.received, None
        output = self._layer(hidden_BSD, *args, **kwargs)
        if not self._sends:
            return output
        _boundary.sent = output
        return output[..., : self._hidden_size]


class LayerRange(nn.Module):
    """Consecutive decoder layers under their index in the whole model, as a model's loop wants them.

    Args:
        layers: by index.
        receives: the first one is given what the stage receives; otherwise it begins the model.
        sends: what the last one returns is sent; otherwise it ends the model.
        hidden_size: D.
    """

    def __init__(self, layers: dict[str, nn.Module], receives: bool, sends: bool, hidden_size: int) -> None:
        super().__init__()
        self._receives, self._sends, self._hidden_size = receives, sends, hidden_size
        for index, layer in layers.items():
            self.add_module(index, layer)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        last = len(self) - 1
        for index, layer in enumerate(self.children()):
            receives, sends = self._receives and index == 0, self._sends and index == last
            yield _BoundaryLayer(layer, receives, sends, self._hidden_size) if receives or sends else layer

    def __getitem__(self, chosen: Any) -> Any:
        return list(self)[chosen]


def cut_to_stage(model: PreTrainedModel, stage: StageLayers) -> None:
    """Leaves only what `stage` needs of a model, in place; names stay those of the whole model."""
    structure = keep_structure(model)
    ends = {"receives": not stage.is_first, "sends": not stage.is_last}
    _keep_layers(model.get_submodule(structure.decoder), structure, slice(stage.first, stage.stop), **ends)
    if not stage.is_first:
        for path in (structure.embedding, *structure.before):
            _remove(model, path)
    if not stage.is_last:
        for path in (*structure.after, structure.output_head):
            _remove(model, path)


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
        segment_attention(model)
        self.loss = CausalLMLoss(model, chunk_size) if stage.is_last else None
        # In a tuple, so that what they share with the model keeps one name. The loss runs the decoder whole.
        structure = structure_of(model)
        self._hidden_size = structure.shape.hidden_size
        self._decoders = _in_two(model, structure, stage, None if stage.is_last else num_ahead)
        last = len(self._decoders) - 1
        for index, decoder in enumerate(self._decoders):
            self.boundary_width = join_stages(
                decoder.get_submodule(structure.list_name).children(),
                self._hidden_size,
                is_first=stage.is_first and index == 0,
                is_last=stage.is_last and index == last,
            )

    def forward(self, received_BSW: Tensor | None, batch: Batch) -> Any:
        """[B,S,W] for the next stage; at the last one, what `CausalLMLoss` returns.

        Args:
            received_BSW: from the stage before; None at the first.
            batch: whole; the first stage reads the token ids, the last one the targets.
        """
        if self.loss is not None:
            with self._entering(received_BSW, batch) as given:
                return self.loss.of(batch, given)
        return self.finish(self.begin(received_BSW, batch), batch)

    def begin(self, received_BSW: Tensor | None, batch: Batch) -> Tensor | None:
        """[B,S,W] for `finish`, from the layers before its own; what was received, if it runs all."""
        if len(self._decoders) == 1:
            return received_BSW
        return self._run(self._decoders[0], received_BSW, batch)

    def finish(self, begun_BSW: Tensor | None, batch: Batch) -> Tensor:
        """[B,S,W] for the next stage, from what `begin` has returned."""
        return self._run(self._decoders[-1], begun_BSW, batch)

    def _run(self, decoder: Any, entering_BSW: Tensor | None, batch: Batch) -> Tensor:
        with self._entering(entering_BSW, batch) as given:
            decoder(**given, use_cache=False)
            leaving_BSW = _boundary.sent
        assert leaving_BSW is not None, "the last layer of the decoder has run"
        return leaving_BSW

    @contextmanager
    def _entering(self, entering_BSW: Tensor | None, batch: Batch) -> Iterator[dict[str, Any]]:
        """A decoder's inputs: token ids, or in their place a tensor that another one has sent."""
        _boundary.received = entering_BSW
        try:
            with rows_of(batch, self.model) as inputs:
                if entering_BSW is not None:
                    del inputs["input_ids"]
                    # Only for its shape, dtype and place: the first layer is given what was sent.
                    inputs["inputs_embeds"] = entering_BSW[..., : self._hidden_size]
                yield inputs
        finally:
            _boundary.received = _boundary.sent = None


def _in_two(
    model: PreTrainedModel, structure: Structure, stage: StageLayers, num_ahead: int | None
) -> tuple[Any, ...]:
    """The decoder without its last `num_ahead` layers, and with these alone; itself if that leaves none."""
    decoder: Any = model.get_submodule(structure.decoder)
    number = stage.stop - stage.first
    if num_ahead is None or not 0 < num_ahead < number:
        return (decoder,)
    halves = []
    cut = number - num_ahead
    for kept, receives in ((slice(0, cut), not stage.is_first), (slice(cut, number), True)):
        half = copy.copy(decoder)
        half._modules = dict(decoder._modules)
        _keep_layers(half, structure, kept, receives=receives, sends=True)
        halves.append(half)
    return tuple(halves)


def _keep_layers(decoder: Any, structure: Structure, kept: slice, *, receives: bool, sends: bool) -> None:
    layers = dict(list(decoder.get_submodule(structure.list_name).named_children())[kept])
    hidden_size = structure.shape.hidden_size
    setattr(decoder, structure.list_name, LayerRange(layers, receives, sends, hidden_size))
    # The decoder counts its layers, and looks their kind up, from 0.
    config = copy.copy(decoder.config)
    number = config.num_hidden_layers
    for key, value in vars(decoder.config).items():
        if isinstance(value, list | tuple) and len(value) == number:
            setattr(config, key, value[kept])
    config.num_hidden_layers = len(layers)
    decoder.config = config


def _remove(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
