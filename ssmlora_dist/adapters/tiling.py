"""The MLP and the norms of a decoder layer, computed a tile of tokens at a time.

What an MLP computes for a token depends on that token alone, the adapters in it included: their state is the
token's own, and its dropout a function of where the token stands. So does what a norm computes, in float32.
Hence a layer's widest tensors exist for the tokens of one tile only: in the forward pass they go with it, in
the backward pass a tile is recomputed, its gradients are taken, and then the next. Outputs and gradients are
those of the whole but for rounding, as sums over tokens are taken tile by tile.

DeepSpeed's `TiledMLP` and `SequenceTiledCompute` have a gradient for one input, and here the state is a
second one; they put the gradients of parameters in place in the midst of a backward pass, and compute every
tile three times under gradient checkpointing. Here it is twice, as without tiles: the recompute of a
checkpoint around ends as soon as it has the MLP's inputs, unless another layer follows in it.

Shapes: B batch, S tokens, T tokens of a tile, D hidden size, A time axes, R rank.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmlora_dist.adapters.layers import LayerCall, LoRALinear, running
from ssmlora_dist.adapters.mixing import mix_in
from ssmlora_dist.adapters.projections import EXPERTS, linear_layers
from ssmlora_dist.adapters.state import layer_context


def find_mlp(layer: nn.Module) -> str | None:
    """Name in a decoder layer of the module that holds linear layers and takes nothing but one tensor.

    None where there is none; experts are not tiled: a token's way through them is chosen for all tokens at
    once.
    """
    for name, child in layer.named_children():
        modules = list(child.modules())
        if (
            len(inspect.signature(child.forward).parameters) == 1
            and len(modules) > 1
            and linear_layers(child)
            and not any(hasattr(module, EXPERTS) for module in modules)
            and not any(isinstance(module, nn.modules.conv._ConvNd) for module in modules)
        ):
            return name
    return None


def untiled_layers(layers: Mapping[int, nn.Module]) -> list[int]:
    """Of decoder layers, by their index in the whole model, those without an MLP to tile."""
    return [index for index, layer in layers.items() if find_mlp(layer) is None]


def is_norm(module: nn.Module) -> bool:
    """Whether a module takes nothing but one tensor and has nothing but numbers of one token's width."""
    weights = [weight.dim() for weight in module.parameters()]
    return (
        not any(module.children())
        and set(weights) == {1}
        and len(inspect.signature(module.forward).parameters) == 1
    )


def tile_layers(
    layers: Mapping[int, nn.Module],
    tile_size: int,
    num_tiles: int | None = None,
    behind: Iterable[nn.Module] = (),
) -> None:
    """Has the MLPs and norms of decoder layers computed in tiles, in place; what is neither stays as it is.

    Args:
        layers: decoder layers by their index in the whole model, with their adapters.
        tile_size: tokens of a tile at most, of all rows together.
        num_tiles: cut always into as many, whatever the number of tokens: where ranks must call modules
            equally often. None: as many as are needed.
        behind: what comes behind the layers, of which the norms are tiled too.
    """
    tiled: list[Any] = [module for module in behind if is_norm(module)]
    for layer in layers.values():
        tiled += [child for child in layer.children() if is_norm(child)]
        if (name := find_mlp(layer)) is not None:
            tiled.append(layer.get_submodule(name))
    for module in tiled:
        if not isinstance(module, Tiled):
            mix_in(module, Tiled)
        module.tile_size, module.num_tiles = tile_size, num_tiles
        module.takes_state = any(isinstance(m, LoRALinear) and m.form.has_state for m in module.modules())


class Tiled(nn.Module):
    """Mixed into the class of an MLP or a norm by `tile_layers`; never made directly.

    Attributes:
        tile_size: tokens of a tile at most.
        num_tiles: how many tiles there always are; None: as many as are needed.
        takes_state: whether an adapter inside has a state.
    """

    tile_size: int
    num_tiles: int | None
    takes_state: bool

    def forward(self, x: Tensor) -> Tensor:
        """[B,S,D] -> [B,S,D], as the module itself computes it."""
        num_tiles = 1
        if x.dim() == 3:
            num_tiles = self.num_tiles or math.ceil(x.shape[0] * x.shape[1] / self.tile_size)
        if num_tiles == 1:
            output: Tensor = self._whole(x)
            return output
        call = running.call
        state = [call.packed()] if call is not None and self.takes_state else []
        # Without the state that entered the layer: what is recomputed from is kept by the checkpoint around.
        stateless = None if call is None else call.tile(0, x.shape[1], None)
        inputs = _TileInputs((x, *state), num_tiles)
        # Not saved as the tiles' inputs are: it tells whose random numbers the recompute needs again.
        device = (x.new_empty(0),)
        outputs = [
            checkpoint(self._tile, inputs, index, stateless, running.adapters, device, use_reentrant=False)
            for index in range(num_tiles)
        ]
        inputs.end_forward()
        y_BSD, *new_state = (torch.cat(parts, 1) for parts in zip(*outputs, strict=True))
        if call is not None and new_state:
            call.replace_state(new_state[0])
        return y_BSD

    def _whole(self, x: Tensor) -> Any:
        return super().forward(x)

    def _tile(
        self,
        inputs: _TileInputs,
        index: int,
        stateless: LayerCall | None,
        adapters: Sequence[LoRALinear],
        _: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """The output [B,T,D] of a tile and, if there is one, its state [B,T,A,R]."""
        first, (x_BTD, *state) = inputs.tile(index)
        call = None
        if stateless is not None:
            call = stateless.tile(first, x_BTD.shape[1], state[0] if state else None)
        with layer_context(adapters, call):
            y_BTD = self._whole(x_BTD)
        return (y_BTD, call.packed()) if call is not None and state else (y_BTD,)


class _TileInputs:
    """What tiles are cut from: at hand in the forward pass, and kept once for the recompute of all of them.

    Saved before the first tile is computed, so that a checkpoint around needs no tile to have them again.

    Args:
        tensors: [B,S,...].
        num_tiles: as even as can be; some are empty if there are fewer tokens.
    """

    def __init__(self, tensors: Sequence[Tensor], num_tiles: int) -> None:
        if torch.is_grad_enabled():
            # Autograd needs something that has a gradient in any case.
            self.node: Any = _Save.apply(torch.empty(0, requires_grad=True), *tensors).grad_fn  # type: ignore[no-untyped-call]
        num_tokens = tensors[0].shape[1]
        self.bounds = [math.ceil(num_tokens * index / num_tiles) for index in range(num_tiles + 1)]
        self.gradients = [_Gradient(tensor.shape, num_tiles) for tensor in tensors]
        self.tensors, self.is_recompute = tensors, False

    def tile(self, index: int) -> tuple[int, list[Tensor]]:
        """Where the first token of a tile stands, and the tile of every tensor."""
        if not self.tensors:
            self.tensors = [
                saved.detach().requires_grad_(saved.requires_grad) for saved in self.node.saved_tensors
            ]
        first, end = self.bounds[index : index + 2]
        # Cut when it is its turn: autograd goes through what was made last first.
        tiles = [
            _Cut.apply(tensor, gradient, first, end)  # type: ignore[no-untyped-call]
            for tensor, gradient in zip(self.tensors, self.gradients, strict=True)
        ]
        if self.is_recompute and index == 0:
            # The backward pass comes to the first tile last.
            self.tensors = []
        return first, tiles

    def end_forward(self) -> None:
        """From now on only what was saved is there."""
        self.tensors, self.is_recompute = [], True


class _Gradient:
    """Of a tensor [B,S,...], as the gradients of its tiles come in one by one."""

    def __init__(self, shape: torch.Size, num_tiles: int) -> None:
        self.shape, self.num_tiles = shape, num_tiles
        self.whole: Tensor | None = None
        self.num_left = num_tiles

    def take(self, first: int, tile: Tensor) -> Tensor | None:
        """Puts the gradient of a tile in its place; all of them, once there is each."""
        if self.whole is None:
            self.whole, self.num_left = tile.new_empty(self.shape), self.num_tiles
        self.whole.narrow(1, first, tile.shape[1]).copy_(tile)
        self.num_left -= 1
        if self.num_left:
            return None
        whole, self.whole = self.whole, None
        return whole


class _Cut(torch.autograd.Function):
    """A tile of a tensor. A slice of torch's would make a gradient of the whole for every tile."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradient: _Gradient, first: int, end: int) -> Tensor:
        ctx.gradient, ctx.first = gradient, first
        return tensor.narrow(1, first, end - first)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.gradient.take(ctx.first, gradients[0]), None, None, None


class _Save(torch.autograd.Function):
    """Saves what it is given, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("nothing is made of what it returns")
