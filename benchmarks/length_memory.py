"""Bytes of a training step by the length of its input, counted: `python benchmarks/length_memory.py`.

SmolLM2-135M's shapes in bfloat16, one row whose every token is predicted, with gradient checkpointing, and
with what spares memory beside it. The step runs on tensors that have shapes but no storage, through the
project's own code; counted are the storages alive on the device, at most, beyond what is there before the
step: weights, and gradients of the micro-batch before. So numbers are exact for the operators that run, and
say nothing of memory within an operator or of an allocator's gaps.

With tiles and checkpoints in host memory, the bytes of a token do not depend on the number of layers, the
width of the MLP or the size of the vocabulary: what grows is one layer's working set outside MLP and norms.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssmlora_dist import AdapterConfig, add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.tiling import tile_layers
from ssmlora_dist.batches import Batch
from ssmlora_dist.config.arguments import run_command
from ssmlora_dist.evaluation.plots import plot_by_length
from ssmlora_dist.models import decoder_layers, load_model, recompute, structure_of
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.shapes import SHAPES
from ssmlora_dist.ops.dropout import token_seeds
from ssmlora_dist.tracking.quiet import quiet_libraries
from ssmlora_dist.tracking.rows import append_row

RESULTS = Path(__file__).parent / "results" / "length_memory.jsonl"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
TILE_SIZE = 1024
CHUNK_SIZE = 128
MODEL = "smollm2"
# From here on every pair adds the same: the first layer receives no state, the last one's input never leaves.
COUNTED_LAYERS = (8, 10)
MIB = 2**20
ADAPTER = AdapterConfig(dropout=0.05, every_layer=("o_proj", "gate_proj", "up_proj", "down_proj"))
"""The shipped placement: time modules on q_proj and v_proj in turn, plain LoRA beside them."""


@dataclass(frozen=True)
class Features:
    """What spares memory beside gradient checkpointing.

    Attributes:
        layers_per_checkpoint: layers that share a checkpoint.
        offload: checkpoints in host memory.
        tile_size: tokens of a tile of the MLP; None: all.
    """

    layers_per_checkpoint: int = 1
    offload: bool = False
    tile_size: int | None = None


FEATURES = {
    "checkpointing alone": Features(),
    "checkpoints in host memory": Features(offload=True),
    "MLP and norms in tiles": Features(tile_size=TILE_SIZE),
    "tiles and host memory": Features(offload=True, tile_size=TILE_SIZE),
    "the same, two layers a checkpoint": Features(2, True, TILE_SIZE),
}


@dataclass(frozen=True)
class Counted:
    """Of one training step.

    Attributes:
        peak_bytes: on the device at most, beyond what is there before.
        host_bytes: of checkpoints in host memory at most.
        logit_rows: tokens whose logits exist in one tensor at most.
    """

    peak_bytes: int
    host_bytes: int
    logit_rows: int


class Alive(TorchDispatchMode):
    """Follows the storages that operators make until they go.

    Args:
        vocab_size: V, to know logits by.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.sizes: dict[int, tuple[str, int]] = {}
        self.alive, self.peak = dict.fromkeys(("device", "host"), 0), dict.fromkeys(("device", "host"), 0)
        self.logit_rows, self.place = 0, "device"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            results = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            # Whether a buffer has gaps, asked while the model is built; there is nothing in it.
            return False
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, Tensor):
                self.follow(result)
        return results

    def follow(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor, once, where tensors are made now."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        if tensor.dim() and tensor.shape[-1] == self.vocab_size:
            self.logit_rows = max(self.logit_rows, tensor.numel() // self.vocab_size)
        self.sizes[key] = self.place, storage.nbytes()
        self._add(*self.sizes[key])
        weakref.finalize(storage, self._forget, key).atexit = False

    def reset(self) -> None:
        """What is there now counts as nothing, also when it goes."""
        self.sizes = {key: (place, 0) for key, (place, _) in self.sizes.items()}
        self.alive, self.peak, self.logit_rows = dict.fromkeys(self.alive, 0), dict.fromkeys(self.alive, 0), 0

    def _add(self, place: str, num_bytes: int) -> None:
        self.alive[place] += num_bytes
        self.peak[place] = max(self.peak[place], self.alive[place])

    def _forget(self, key: int) -> None:
        place, num_bytes = self.sizes.pop(key)
        self._add(place, -num_bytes)


class CountedCopier(recompute.Copier):
    """Has what is host memory beside a GPU count as such."""

    def __init__(self, alive: Alive) -> None:
        super().__init__(torch.device("cpu"))
        self.counts = alive

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        """Of the shape and dtype of `tensor`, in host memory."""
        self.counts.place = "host"
        try:
            return super().empty_on_host(tensor)
        finally:
            self.counts.place = "device"


class Step:
    """A model whose training step is counted, for one length after the other.

    Args:
        shape: a bare configuration of a model.
        chunk_size: tokens whose logits exist at a time.
    """

    def __init__(self, shape: Mapping[str, Any], chunk_size: int) -> None:
        self.alive, self.fake = Alive(shape["vocab_size"]), FakeTensorMode(allow_non_fake_inputs=True)
        with self._without_storage():
            model = load_model(
                init="random", config=dict(shape), quantization="none", compute_dtype=torch.bfloat16
            )
            self.model = add_adapters(model, ADAPTER).train()
            for parameter in adapter_parameters(self.model).values():
                parameter.grad = torch.zeros_like(parameter)
        self.loss = CausalLMLoss(self.model, chunk_size).train()
        assert not self.loss.uses_own_logits, "all at once"
        for parameter in self.model.parameters():
            self.alive.follow(parameter)

    def count(self, num_tokens: int, features: Features) -> Counted:
        """Counts a forward and a backward pass over one row of so many tokens; tiles, once made, stay."""
        checkpoint_layers(self.model, 0, features.layers_per_checkpoint, offload=features.offload)
        if features.tile_size is not None:
            behind = map(self.model.get_submodule, structure_of(self.model).after)
            tile_layers(decoder_layers(self.model), features.tile_size, behind=behind)
        tokens = torch.zeros(1, num_tokens, dtype=torch.long)
        batch = Batch.of(
            tokens,
            input_ids=tokens,
            position_ids=torch.arange(num_tokens)[None],
            dropout_seeds=token_seeds(0, num_tokens)[None],
        )
        with self._without_storage():
            self.alive.reset()
            self.loss(batch).backward()
        return Counted(self.alive.peak["device"], self.alive.peak["host"], self.alive.logit_rows)

    @contextmanager
    def _without_storage(self) -> Iterator[None]:
        with as_on_a_device(self.alive), self.fake, self.alive:
            yield


def count_deep_step(
    steps: Mapping[int, Step], num_layers: int, num_tokens: int, features: Features
) -> Counted:
    """Of a model of any depth, from two of the same shape: every pair of layers adds the same bytes."""
    (few, step), (more, deeper) = sorted(steps.items())
    one, two = (each.count(num_tokens, features) for each in (step, deeper))

    def at_depth(first: int, second: int) -> int:
        return first + (second - first) * (num_layers - few) // (more - few)

    return Counted(
        at_depth(one.peak_bytes, two.peak_bytes),
        at_depth(one.host_bytes, two.host_bytes),
        max(one.logit_rows, two.logit_rows),
    )


@contextmanager
def as_on_a_device(alive: Alive) -> Iterator[None]:
    """Lets tensors without storage take the ways of tensors on a GPU."""
    copier = CountedCopier(alive)
    with (
        mock.patch.object(recompute, "_copier", return_value=copier),
        # Otherwise transformers takes them for a graph that is traced, and makes masks that no step needs.
        mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False),
    ):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="rows; the plot goes beside them")
    arguments = parser.parse_args()
    quiet_libraries()
    peaks: dict[str, dict[int, int]] = {name: {} for name in FEATURES}
    shape = SHAPES[MODEL]
    steps = {number: Step(shape | {"num_hidden_layers": number}, CHUNK_SIZE) for number in COUNTED_LAYERS}
    print("bytes a token, and since the length before; in host memory")
    for name, features in FEATURES.items():
        before = (0, 0)
        for num_tokens in arguments.tokens:
            counted = count_deep_step(steps, shape["num_hidden_layers"], num_tokens, features)
            peaks[name][num_tokens] = counted.peak_bytes
            growth = (counted.peak_bytes - before[1]) / (num_tokens - before[0])
            before = num_tokens, counted.peak_bytes
            row = {
                "benchmark": "length_memory",
                "model": MODEL,
                "dtype": "bfloat16",
                "features": name,
                **asdict(features),
                "loss_chunk_size": CHUNK_SIZE,
                "tokens": num_tokens,
                **asdict(counted),
                "peak_bytes_per_token": counted.peak_bytes / num_tokens,
                "growth_bytes_per_token": growth,
            }
            append_row(arguments.out, row)
            print(
                f"{name:33} {num_tokens:7,} {row['peak_bytes_per_token']:10,.0f} {growth:10,.0f} "
                f"{counted.host_bytes / num_tokens:10,.0f}",
                flush=True,
            )
    curves = {
        name: {length: (mib, mib, mib) for length, mib in ((n, b / MIB) for n, b in own.items())}
        for name, own in peaks.items()
    }
    title = (
        f"Memory of a training step beyond the weights, counted: SmolLM2-135M, tiles of {TILE_SIZE} tokens"
    )
    plot_by_length(curves, title, arguments.out.with_suffix(".png"), "MiB")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
