"""What the parts of an adapted decoder cost in time and memory, from plain numbers.

Arithmetic stands for time. Everything is counted in whole numbers, per micro-batch of one pipeline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ssmlora_dist.distributed.schedule import Recompute
from ssmlora_dist.sizes import DecoderShape, LayerSizes

FLOAT32_BYTES = 4
ADAPTER_BYTES_PER_PARAMETER = 4 * FLOAT32_BYTES  # parameter, gradient and AdamW's two moments


class KeptInputs(NamedTuple):
    """Widths of the inputs that the adapters of a decoder layer keep.

    Attributes:
        attention: of the projections in front of attention; what comes behind it is kept anyway.
        mlp: of those in front of the MLP's activation function.
        inner: of the one behind it.
    """

    attention: int
    mlp: int
    inner: int


@dataclass(frozen=True)
class AdapterShape:
    """Sizes of the adapters.

    Attributes:
        parameters_by_layer: trained parameters of each decoder layer.
        num_axes: A of the state [B,S,A,R]; 0 for plain LoRA.
        rank: R.
        state_dtype_bytes: bytes of one number of the state between layers.
        inputs_by_layer: of each decoder layer, what adapters keep for their gradients; none given: nothing.
        parameters_before: trained parameters in front of the layers, of an embedding that is trained whole.
        parameters_after: those behind them, of the final norm and the head.
    """

    parameters_by_layer: tuple[int, ...]
    num_axes: int
    rank: int
    state_dtype_bytes: int
    inputs_by_layer: tuple[KeptInputs, ...] = ()
    parameters_before: int = 0
    parameters_after: int = 0


@dataclass(frozen=True)
class Workload:
    """What one pipeline computes in one step.

    Attributes:
        sequence_length: S, in tokens.
        micro_batch_size: B, in sequences.
        num_micro_batches: per step.
        supervised_tokens: per sequence; output head and loss see only these.
        loss_chunk_size: supervised tokens whose logits exist at one time.
        recompute: when activations are recomputed; `none` without gradient checkpointing.
        layers_ahead: of each stage, how many of its last layers `while_waiting` is for, the others being
            recomputed on their gradient; None: all.
        layers_per_checkpoint: layers that are recomputed together, from the first one's input.
        offload_checkpoints: whether these inputs are kept in host memory.
        mlp_tile_size: tokens whose activations in MLP and norms exist at one time; None: all.
    """

    sequence_length: int
    micro_batch_size: int
    num_micro_batches: int
    supervised_tokens: int
    loss_chunk_size: int
    recompute: Recompute
    layers_ahead: int | None = None
    layers_per_checkpoint: int = 1
    offload_checkpoints: bool = False
    mlp_tile_size: int | None = None


@dataclass(frozen=True)
class PartCost:
    """Cost of one part of the model - a layer, the embedding, or norm, head and loss - per micro-batch.

    Attributes:
        forward_flops: F.
        recompute_flops: R, what `Workload.recompute` decides over; 0 where nothing is recomputed.
        backward_flops: B, the gradients of the inputs and of the adapters, and the recompute of tiles.
        frozen_bytes: weights of the backbone.
        adapter_bytes: adapters with their gradients and moments.
        input_bytes: of the part's input, which is kept where the rest is recomputed.
        saved_bytes: what the backward pass needs.
        working_bytes: what it holds beside that, at most.
        dequantized_bytes: of quantised weights, dequantised, where the recompute comes right before the
            backward pass: they live between the two, part by part.
    """

    forward_flops: int
    recompute_flops: int
    backward_flops: int
    frozen_bytes: int
    adapter_bytes: int
    input_bytes: int
    saved_bytes: int
    working_bytes: int = 0
    dequantized_bytes: int = 0


@dataclass(frozen=True)
class ModelCosts:
    """Costs of all parts of a model.

    Attributes:
        embedding: of the token embedding.
        layers: of each decoder layer.
        head: of final norm, output head and loss.
        shared_bytes: what embedding and head hold in common when they are on the same stage.
        num_micro_batches: per step.
        recompute: when activations are recomputed.
        layers_ahead, layers_per_checkpoint, offload_checkpoints: as in `Workload`.
    """

    embedding: PartCost
    layers: tuple[PartCost, ...]
    head: PartCost
    shared_bytes: int
    num_micro_batches: int
    recompute: Recompute
    layers_ahead: int | None = None
    layers_per_checkpoint: int = 1
    offload_checkpoints: bool = False

    def ahead(self, layers: range) -> range:
        """Those of a stage's layers that are recomputed while it waits: the last ones."""
        if self.recompute != "while_waiting":
            return layers[len(layers) :]
        number = len(layers) if self.layers_ahead is None else min(self.layers_ahead, len(layers))
        return layers[len(layers) - number :]

    def checkpoints(self, layers: range) -> list[range]:
        """Those of a stage's layers that are recomputed on their gradient, as they share checkpoints."""
        recomputed = layers[: len(layers) - len(self.ahead(layers))]
        number = self.layers_per_checkpoint
        return [recomputed[first : first + number] for first in range(0, len(recomputed), number)]


def bytes_per_weight(
    mode: Literal["nf4", "fp4", "int8", "none"], *, double_quantization: bool, compute_dtype_bytes: int
) -> float:
    """Bytes that one weight of a frozen linear layer takes, its share of the block scales included.

    Four bits come with a float32 scale for each 64 weights or, quantised doubly, with an 8-bit scale for each
    64 and a float32 scale for each 256 of these. The row scales of int8 are too few to count.
    """
    if mode == "none":
        return float(compute_dtype_bytes)
    if mode == "int8":
        return 1.0
    scale_bytes = 1 + FLOAT32_BYTES / 256 if double_quantization else FLOAT32_BYTES
    return 0.5 + scale_bytes / 64


def model_costs(
    shape: DecoderShape,
    adapters: AdapterShape,
    workload: Workload,
    *,
    bytes_per_linear_weight: float,
    compute_dtype_bytes: int,
) -> ModelCosts:
    """Costs of every part of an adapted model with a frozen backbone.

    Per token a weight costs 2 FLOPs forward and 2 backward, the latter for the input's gradient alone; an
    adapter's parameter 2 and 4. Causal attention costs 2 FLOPs per token, position and unit of width forward
    and 4 backward. Norms, activation functions and the embedding's look-up count as nothing.

    Args:
        shape: of the decoder.
        adapters: their sizes.
        workload: what is computed.
        bytes_per_linear_weight: of the projections of the layers (`bytes_per_weight`); embedding and head are
            stored in the compute dtype.
        compute_dtype_bytes: bytes of one activation.
    """
    table_bytes = shape.vocab_size * shape.hidden_size * compute_dtype_bytes
    return ModelCosts(
        embedding=PartCost(
            0, 0, 0, table_bytes, adapters.parameters_before * ADAPTER_BYTES_PER_PARAMETER, 0, 0
        ),
        layers=tuple(
            _layer_cost(
                layer,
                shape.hidden_size,
                adapters,
                parameters,
                kept,
                workload,
                bytes_per_linear_weight,
                compute_dtype_bytes,
            )
            for layer, parameters, kept in zip(
                shape.layers,
                adapters.parameters_by_layer,
                adapters.inputs_by_layer or (KeptInputs(0, 0, 0),) * shape.num_layers,
                strict=True,
            )
        ),
        head=_head_cost(shape, adapters.parameters_after, workload, compute_dtype_bytes),
        shared_bytes=table_bytes if shape.tied_embeddings else 0,
        num_micro_batches=workload.num_micro_batches,
        recompute=workload.recompute,
        layers_ahead=workload.layers_ahead,
        layers_per_checkpoint=workload.layers_per_checkpoint,
        offload_checkpoints=workload.offload_checkpoints,
    )


def _layer_cost(
    layer: LayerSizes,
    hidden: int,
    adapters: AdapterShape,
    parameters: int,
    inputs: KeptInputs,
    workload: Workload,
    bytes_per_linear_weight: float,
    compute_dtype_bytes: int,
) -> PartCost:
    state = adapters.num_axes * adapters.rank
    tokens = workload.micro_batch_size * workload.sequence_length
    linear = 2 * tokens * layer.multiplied_weights
    attention = 2 * tokens * workload.sequence_length * layer.attention_size
    forward = linear + attention + 2 * tokens * parameters
    # A frozen product keeps nothing; what stands between two is kept for the operations there.
    mlp = layer.mlp_activation_size
    attention_kept = layer.activation_size - hidden - mlp
    is_quantized = bytes_per_linear_weight < compute_dtype_bytes
    tile_flops = 0
    if workload.mlp_tile_size is None or not layer.mlp_weights:
        # The two norms' inputs are in float32. Of the MLP every tensor has its gradient, but for the input of
        # the product behind the activation function, which is gone by then.
        saved = inputs.attention + attention_kept + inputs.mlp + inputs.inner + mlp
        norm_bytes = 2 * FLOAT32_BYTES
        working = tokens * (hidden + mlp - inputs.inner)
    else:
        # Of the second norm and of the MLP their inputs are kept, from which tiles are cut, and have their
        # gradients; then, the MLP's weights gone, attention's tensors have theirs.
        saved = inputs.attention + attention_kept + 2 * hidden
        norm_bytes = 0
        working = max(
            2 * tokens * hidden + 2 * min(tokens, workload.mlp_tile_size) * mlp,
            tokens * (attention_kept - hidden) - is_quantized * layer.mlp_weights,
        )
        tile_flops = 2 * tokens * layer.mlp_weights
    # Tiles are recomputed in the backward pass, and before it only for a layer that follows.
    recompute = forward - tile_flops // workload.layers_per_checkpoint
    stored = layer.linear_weights + layer.expert_weights
    # The last product's weight is gone by then; experts' do not stay, the largest tensor's is there.
    dequantized = layer.linear_weights - layer.last_weights + layer.largest_expert_weights
    return PartCost(
        forward_flops=forward,
        recompute_flops=recompute if workload.recompute != "none" else 0,
        backward_flops=linear + 2 * attention + 4 * tokens * parameters + tile_flops,
        frozen_bytes=math.ceil(stored * bytes_per_linear_weight) + layer.other_weights * compute_dtype_bytes,
        adapter_bytes=parameters * ADAPTER_BYTES_PER_PARAMETER,
        input_bytes=tokens * (hidden * compute_dtype_bytes + state * adapters.state_dtype_bytes),
        saved_bytes=tokens * (saved * compute_dtype_bytes + hidden * norm_bytes),
        working_bytes=working * compute_dtype_bytes,
        dequantized_bytes=dequantized * compute_dtype_bytes if is_quantized else 0,
    )


def _head_cost(
    shape: DecoderShape, parameters: int, workload: Workload, compute_dtype_bytes: int
) -> PartCost:
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    tokens = workload.micro_batch_size * workload.sequence_length
    supervised = workload.micro_batch_size * workload.supervised_tokens
    product = 2 * supervised * hidden * vocabulary
    # Of one chunk, in float32: logarithms of probability, their gradients and those of the logits.
    chunk = min(supervised, workload.loss_chunk_size)
    logits = 3 * chunk * vocabulary * FLOAT32_BYTES
    norm_bytes = FLOAT32_BYTES if workload.mlp_tile_size is None else compute_dtype_bytes
    # What is supervised, in front of the head, and gradients of the chunks before.
    before_head = (2 * supervised - chunk) * hidden * compute_dtype_bytes
    return PartCost(
        forward_flops=product,
        recompute_flops=0,
        # The chunks of the loss recompute their logits whatever is done with the layers.
        backward_flops=2 * product,
        frozen_bytes=(vocabulary + 1) * hidden * compute_dtype_bytes,
        adapter_bytes=parameters * ADAPTER_BYTES_PER_PARAMETER,
        input_bytes=tokens * hidden * compute_dtype_bytes,
        saved_bytes=tokens * hidden * norm_bytes + before_head + logits,
    )
