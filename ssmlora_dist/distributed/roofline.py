"""How fast a training step could be at best on a device: the limit that measured speeds are set against.

A frozen weight costs 2 FLOPs per token forward, 2 backward to the input and, with gradient checkpointing, 2
again for the recompute, which can do without a layer's last projection. Quantised weights are dequantised
twice: forward, and backward with the recompute; those of experts in each of the three, as they are not kept
in between. That is bound by memory: the packed bytes are read and 16-bit weights written. Adapters, norms,
activation functions and the optimiser count as nothing: what they take is what is to be seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ssmlora_dist.sizes import DecoderShape


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best, as measured on it.

    Attributes:
        matmul_tflops: large matrix products in the compute dtype, TFLOP/s.
        attention_tflops: the attention kernel, of the FLOPs that the causal mask leaves, TFLOP/s.
        bandwidth_gb_per_second: reading and writing memory, 1e9 bytes/s.
    """

    matmul_tflops: float
    attention_tflops: float
    bandwidth_gb_per_second: float


@dataclass(frozen=True)
class StepLimit:
    """Least time of one micro-batch.

    Attributes:
        num_tokens: in the micro-batch.
        matmul_seconds: matrix products with frozen weights.
        attention_seconds: attention.
        dequantization_seconds: of quantised weights.
    """

    num_tokens: int
    matmul_seconds: float
    attention_seconds: float
    dequantization_seconds: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.matmul_seconds + self.attention_seconds + self.dequantization_seconds

    @property
    def tokens_per_second(self) -> float:
        """At that."""
        return self.num_tokens / self.seconds


def step_limit(
    shape: DecoderShape,
    ceilings: Ceilings,
    *,
    sequence_length: int,
    micro_batch_size: int = 1,
    supervised_tokens: int | None = None,
    checkpointing: bool = True,
    bytes_per_linear_weight: float | None = None,
    compute_dtype_bytes: int = 2,
) -> StepLimit:
    """The limit of one micro-batch, forward and backward.

    Args:
        shape: of the decoder.
        ceilings: of the device.
        sequence_length: S.
        micro_batch_size: B.
        supervised_tokens: per sequence, which the output head sees; None: all.
        checkpointing: whether layers are recomputed; the loss recomputes its logits in any case.
        bytes_per_linear_weight: `cost_model.bytes_per_weight` of quantised weights; None: not quantised.
        compute_dtype_bytes: of a dequantised weight.
    """
    passes = 3 if checkpointing else 2
    tokens = micro_batch_size * sequence_length
    supervised = micro_batch_size * (sequence_length if supervised_tokens is None else supervised_tokens)
    multiplied = sum(layer.multiplied_weights for layer in shape.layers)
    head_weights = shape.hidden_size * shape.vocab_size
    # Nothing but its weight is needed of a layer's last product; experts' go into the router's gradient.
    not_again = sum(layer.last_weights for layer in shape.layers) if checkpointing else 0
    matmul_flops = 2 * tokens * (passes * multiplied - not_again) + 2 * 3 * supervised * head_weights
    # Forward two products of S/2 positions each; backward five, as the scores are computed again.
    forward = 2 * tokens * sequence_length * sum(layer.attention_size for layer in shape.layers)
    attention_flops = forward * (passes - 1 + 2.5)
    moved = 0.0
    if bytes_per_linear_weight is not None:
        # Experts' weights do not live from the recompute to the backward pass.
        dequantized = sum(2 * layer.linear_weights + passes * layer.expert_weights for layer in shape.layers)
        moved = dequantized * (bytes_per_linear_weight + compute_dtype_bytes)
    return StepLimit(
        num_tokens=tokens,
        matmul_seconds=matmul_flops / (ceilings.matmul_tflops * 1e12),
        attention_seconds=attention_flops / (ceilings.attention_tflops * 1e12),
        dequantization_seconds=moved / (ceilings.bandwidth_gb_per_second * 1e9),
    )


def measured_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> Ceilings:
    """Of this device, in `dtype`: the best of `repeats` large operations of each kind.

    On a CPU by the time that its threads computed, so that what else is running there does not count.
    """
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else lambda: time.process_time() / torch.get_num_threads()
    size, length, heads, width = (8192, 8192, 32, 128) if cuda else (1024, 1024, 9, 64)

    def best(operation: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeats + 2):
            if cuda:
                torch.cuda.synchronize(device)
            started = clock()
            operation()
            if cuda:
                torch.cuda.synchronize(device)
            seconds.append(clock() - started)
        return min(seconds)

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    q, k, v = (torch.randn(1, heads, length, width, device=device).to(dtype) for _ in range(3))
    read, written = torch.empty(2, 2**28 if cuda else 2**26, dtype=torch.uint8, device=device)
    attention_flops = 2 * heads * length * length * width
    return Ceilings(
        matmul_tflops=2 * size**3 / best(lambda: a @ b) / 1e12,
        attention_tflops=attention_flops
        / best(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        / 1e12,
        bandwidth_gb_per_second=2 * read.nbytes / best(lambda: written.copy_(read)) / 1e9,
    )
