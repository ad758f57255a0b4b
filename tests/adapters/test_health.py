"""The state's health: what is counted, and that counting changes nothing."""

from __future__ import annotations

import pytest
import torch

from ssmlora_dist.adapters.health import StateHealth, watch_state
from ssmlora_dist.adapters.placement import time_axes
from ssmlora_dist.ops.ssmlora import SSMLoRA
from tests.tiny import QV_AND_MLP, adapted_model, token_ids

CPU = torch.device("cpu")


def test_means_per_token_of_known_rows() -> None:
    health = StateHealth({"q_proj": "ssmlora", "v_proj": "ssmlora"}, CPU)
    rows = torch.tensor([[[0.0, 0.5, 1.0, 0.4], [0.0, 1.99, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]]])
    # Nothing enters by way of z: h is what was received.
    silent = {"state_transition": torch.zeros(4, 4), "state_input": torch.zeros(4, 4)}
    health.add(1, SSMLoRA(rank=4).measure(torch.zeros_like(rows), rows, silent))
    metrics = health.metrics(health.sums.tolist())
    # Spreads 1, 2, 0; of the two inner components none, one (1.99 of 2), both saturated; the last is dead.
    assert metrics == {
        "state_spread_v_proj": pytest.approx(1.0),
        "state_saturation_v_proj": pytest.approx(0.5),
        "state_dead_rows_v_proj": pytest.approx(1 / 3),
    }


def test_watching_counts_every_token_and_changes_no_number() -> None:
    model = adapted_model()
    tokens = token_ids(2, 7)
    expected = model(tokens, use_cache=False).logits
    with watch_state(model, time_axes(QV_AND_MLP), CPU) as health:
        assert torch.equal(model(tokens, use_cache=False).logits, expected)
    assert health.sums[-2:].tolist() == [3 * tokens.numel()] * 2
    metrics = health.metrics(health.sums.tolist())
    assert set(metrics) == {
        f"state_{kind}_{axis}"
        for kind in ("spread", "saturation", "dead_rows")
        for axis in ("q_proj", "v_proj")
    }
    assert metrics["state_spread_q_proj"] > 0
    model(tokens, use_cache=False)
    assert health.sums[-2] == 3 * tokens.numel(), "it still watches after the body"
