"""States replaced by their means over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import AdapterConfig
from ssmlora_dist.adapters.state_means import record_states, replaced_states
from tests.tiny import adapted_model, token_ids

# Float32 logits of several units, of which the mean over some tokens is added in another order.
TOLERANCE = 1e-5


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
        return found


@pytest.mark.parametrize("method", ["ssmlora", "gated", "rolled"])
def test_a_state_that_is_its_mean_is_worth_nothing(method: str) -> None:
    model = adapted_model(config=AdapterConfig(rank=4, method=method))
    token = token_ids(1, 1)
    with record_states(model) as means:
        expected = logits(model, token)
    with replaced_states(model, means):
        torch.testing.assert_close(logits(model, token), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_mean_over_other_tokens_takes_the_state_away() -> None:
    model = adapted_model()
    tokens = token_ids(2, 7)
    expected = logits(model, tokens)
    with record_states(model) as means:
        assert torch.equal(logits(model, tokens), expected)
        logits(model, token_ids(1, 3, seed=1))
    assert set(means.num_tokens.values()) == {17}
    assert len(means.sums) == 6, "plain LoRA has no state"
    with replaced_states(model, means):
        replaced = logits(model, tokens)
    assert not torch.allclose(replaced, expected, atol=0.01)
    assert torch.equal(logits(model, tokens), expected), "the states are back"


def test_the_mean_is_that_of_what_the_state_adds() -> None:
    """With W_b of one adapter alone, its output moves by scaling (mean n - n) W_b."""
    model = adapted_model(config=AdapterConfig(rank=4, alternate=["q_proj"]), num_layers=1)
    layer = model.model.layers[0]
    adapter = layer.self_attn.q_proj
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), record_states(model) as means:
        outputs: list[Tensor] = []
        hook = adapter.register_forward_hook(lambda module, args, output: outputs.append(output))
        positions = model.model.rotary_emb(x, torch.arange(5)[None])
        layer(x, position_embeddings=positions)
        own_input = layer.input_layernorm(x)
        with replaced_states(model, means):
            layer(x, position_embeddings=positions)
        hook.remove()
    z = own_input @ adapter.lora_A.weight.T
    u, _ = adapter.form.step(z, torch.zeros(1, 5, 4), adapter.form_parameters, lambda tensor: tensor)
    state = u - z
    moved = adapter.scaling * (state.mean(1, keepdim=True) - state) @ adapter.lora_B.weight.T
    torch.testing.assert_close(outputs[1] - outputs[0], moved, rtol=TOLERANCE, atol=TOLERANCE)
