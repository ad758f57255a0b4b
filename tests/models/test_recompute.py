"""Checkpoints in host memory: what stays on the device, and that no copy is read before it is done.

On a CPU both ends are the same memory; what is tested here is everything but CUDA's own streams and events.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist.batches import Batch
from ssmlora_dist.models import recompute
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.recompute import Copier
from tests.tiny import adapted_model, layers_of, token_ids

NUM_LAYERS = 6


class LateCopier(Copier):
    """Copies only when waited for, into memory that holds nothing until then."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.pending: list[tuple[Tensor, weakref.ref[Tensor]]] = []
        self.num_copies = 0

    def empty_on_host(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, torch.nan)

    def empty_on_device(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, torch.nan)

    def copy(self, target: Tensor, source: Tensor) -> int:
        self.pending.append((target, weakref.ref(source)))
        self.num_copies += 1
        return self.num_copies

    def wait(self, copied: Any) -> None:
        while self.pending and self.num_copies - len(self.pending) < copied:
            target, reference = self.pending.pop(0)
            source = reference()
            assert source is not None, "given back before it was copied"
            target.copy_(source)


def gradients(model: Any, late: LateCopier | None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    if late is not None:
        monkeypatch.setattr(recompute, "_copier", lambda _: late)
    tokens = token_ids(2, 9)
    module = CausalLMLoss(model.train(), chunk_size=5)
    # Two micro-batches in flight, as in a pipeline.
    losses = [module(Batch.of(each, input_ids=each)) for each in (tokens, tokens.flip(1))]
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("number", [1, 4])
def test_copies_are_waited_for(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = gradients(adapted_model(), None, monkeypatch)
    model, late = adapted_model(), LateCopier()
    checkpoint_layers(model, layers_per_checkpoint=number, offload=True)
    got = gradients(model, late, monkeypatch)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    # Hidden states and state of every checkpoint but the first, which has no state; the second pass's last
    # checkpoint never left.
    num_checkpoints = -(-NUM_LAYERS // number)
    num_tensors = 2 * num_checkpoints - 1
    assert late.num_copies == 2 * 2 * num_tensors - 2


def test_only_the_last_checkpoint_is_on_the_device_and_the_next_comes_back_ahead() -> None:
    model = adapted_model().train()
    checkpoint_layers(model, offload=True)
    inputs: list[weakref.ref[Any]] = []

    def note(_: Any, args: tuple[Any, ...]) -> None:
        hidden = args[0] if isinstance(args[0], Tensor) else args[0][0]
        inputs.append(weakref.ref(hidden.untyped_storage()))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers_of(model)]
    tokens = token_ids(2, 9)
    loss = CausalLMLoss(model, chunk_size=5)(Batch.of(tokens, input_ids=tokens))
    assert [each() is not None for each in inputs] == [False] * (NUM_LAYERS - 1) + [True]
    for hook in hooks:
        hook.remove()
    ahead: list[bool] = []
    kept = recompute._latest.kept()
    chain = []
    while kept is not None:
        chain.append(kept)
        kept = kept.before()
    for index, layer in enumerate(reversed(layers_of(model))):
        following = chain[index + 1] if index + 1 < NUM_LAYERS else None
        layer.input_layernorm.register_forward_pre_hook(
            lambda *_, following=following: ahead.append(following is not None and bool(following.on_device))
        )
    loss.backward()
    assert ahead == [True] * (NUM_LAYERS - 1) + [False]
    assert not any(each.on_device for each in chain)


def test_a_pass_without_gradients_keeps_nothing() -> None:
    model = adapted_model().train()
    checkpoint_layers(model, layers_per_checkpoint=2, offload=True)
    tokens = token_ids(2, 9)
    expected = adapted_model().train()(tokens).logits
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
    assert recompute._latest.kept() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_same_gradients_for_less_memory() -> None:
    def measured(switch: Any) -> tuple[dict[str, Tensor], int]:
        model = adapted_model(num_layers=24, hidden_size=256).cuda().train()
        switch(model)
        tokens = token_ids(1, 64).repeat(1, 64)
        batch = Batch.of(tokens, input_ids=tokens).to(torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        CausalLMLoss(model, chunk_size=512)(batch).backward()
        peak = torch.cuda.max_memory_allocated() - held
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, peak

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        wanted, most = measured(checkpoint_layers)
        got, least = measured(partial(checkpoint_layers, offload=True))
    finally:
        torch.use_deterministic_algorithms(False)
    # Hidden states in float32: all of them but the two that are copied, and the rounding of the allocator.
    assert most - least > 20 * 4096 * 256 * 4
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])
