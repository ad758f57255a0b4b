"""What adapters cost beside PEFT's LoRA: operators of a step, and bytes kept for its backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.adapter_variants import EagerTimeModule
from ssmlora_dist import AdapterConfig
from ssmlora_dist.adapters.layers import LoRALinear
from tests.tiny import adapted_model, tiny_model

# PEFT warns of much that is meant here.
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_LAYERS, NUM_TOKENS, RANK = 4, 512, 8
# Layers of SmolLM2-135M.
SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": NUM_TOKENS,
    "initializer_range": 0.02,
    "num_layers": NUM_LAYERS,
}
FREE = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.alias.default}


def build(kind: str, dtype: torch.dtype, dropout: float) -> Any:
    """A model, of which `kind` is one of frozen, ssmlora, eager, lora, peft."""
    if kind in ("frozen", "peft"):
        model = tiny_model(dtype=dtype, **SHAPE)
        if kind == "peft":
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], lora_dropout=dropout)
            model = peft.get_peft_model(model, config).base_model.model
        return model
    everywhere = ("q_proj", "v_proj") if kind == "lora" else ()
    alternate = () if everywhere else ("q_proj", "v_proj")
    method: Any = "lora" if everywhere else "ssmlora"
    settings = AdapterConfig(
        method=method, rank=RANK, dropout=dropout, alternate=alternate, every_layer=everywhere
    )
    model = adapted_model(config=settings, dtype=dtype, **SHAPE)
    for module in model.modules():
        if kind == "eager" and isinstance(module, LoRALinear):
            module.__class__ = EagerTimeModule
    return model


class Operators(TorchDispatchMode):
    """Counts what computes; views cost nothing."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func not in FREE
        return func(*args, **(kwargs or {}))


def costs(kind: str, dtype: torch.dtype, dropout: float = 0.0) -> tuple[float, float]:
    """Operators of forward and backward, and bytes that the graph keeps apart from parameters; per layer."""
    model: nn.Module = build(kind, dtype, dropout).train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Held, so that its address is nobody else's.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    embeddings = torch.randn(1, NUM_TOKENS, SHAPE["hidden_size"]).to(dtype).requires_grad_()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "peft" and dtype == torch.bfloat16)
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    with Operators() as operators:
        with autocast, saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            loss = hidden.float().square().mean()
        loss.backward()
    total = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in known)
    return operators.count / NUM_LAYERS, total / NUM_LAYERS


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def beyond_frozen(dtype: torch.dtype, *kinds: str, dropout: float = 0.0) -> list[tuple[float, float]]:
    frozen = costs("frozen", dtype)
    measured = [costs(kind, dtype, dropout) for kind in kinds]
    print({kind: (m[0] - frozen[0], m[1] - frozen[1]) for kind, m in zip(kinds, measured, strict=True)})
    return [(operators - frozen[0], kept - frozen[1]) for operators, kept in measured]


def test_fewer_operators_than_pefts_lora_and_than_half_the_eager_form(dtype: torch.dtype) -> None:
    ours, lora, peft, eager = (n for n, _ in beyond_frozen(dtype, "ssmlora", "lora", "peft", "eager"))
    assert ours < peft
    assert ours < eager / 2
    assert lora < peft


def test_fewer_bytes_are_kept_than_by_pefts_lora(dtype: torch.dtype) -> None:
    ours, lora, peft = (kept for _, kept in beyond_frozen(dtype, "ssmlora", "lora", "peft", dropout=0.1))
    assert ours <= 0.26 * peft
    assert lora <= 0.26 * peft


def test_no_more_bytes_are_kept_than_by_pefts_lora_without_dropout(dtype: torch.dtype) -> None:
    ours, lora, peft = (kept for _, kept in beyond_frozen(dtype, "ssmlora", "lora", "peft"))
    element = dtype.itemsize
    x, per_rank = NUM_TOKENS * SHAPE["hidden_size"] * element, NUM_TOKENS * RANK * element
    assert ours == x + 3 * per_rank, "x, z, and the state of two axes"
    assert lora == x + 2 * per_rank, "x once, and z of each"
    assert lora <= peft
    # In float32 PEFT keeps just what our LoRA does.
    assert ours <= peft + (per_rank if dtype == torch.float32 else 0)
