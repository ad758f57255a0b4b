"""What a probe measures, and that it leaves the backbone as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from ssmlora_dist import add_adapters
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.probe import candidates
from ssmlora_dist.batches import Batch
from ssmlora_dist.config.build import build_backbone, check_model, probe_budget
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.loss_scale import LossScale
from ssmlora_dist.errors import AdapterError, TrainingError
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.training import probe
from ssmlora_dist.training.probe import gradient_scores, probe_places
from tests.tiny import tiny_config, token_ids

# Float32: a gradient through one product in place of two.
SCORE_TOLERANCE = 1e-4
# float16 has 11 bits, and a squared norm twice the relative error of many sums of them.
HALF_TOLERANCE = 0.05
NUM_LAYERS = 4


def run_config(training: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "quantization": "none",
        "compute_dtype": "float32",
        "adapter": {},
    } | changes
    return RunConfig.model_validate(
        {
            "run": {"name": "run", "seed": 3},
            "model": {
                "init": "random",
                "config": tiny_config(num_layers=NUM_LAYERS),
                "tokenizer": "bytes",
                "compute_dtype": settings["compute_dtype"],
            },
            "quantization": {"mode": settings["quantization"]},
            "adapter": {"rank": 4, "placement": "probe"} | settings["adapter"],
            "data": {"train": {"format": "task", "task": {"task": "passkey"}}, "max_length": 64},
            "training": {"max_steps": 1, "loss_chunk_size": 5} | (training or {}),
        }
    )


def backbone_of(config: RunConfig) -> Any:
    return build_backbone(config, torch.device("cpu"))


def batches(number: int = 3, seed: int = 0) -> list[Batch]:
    """Rows with different numbers of targets."""
    rows = []
    for index in range(number):
        tokens = token_ids(2, 9, seed=seed + index)
        labels = tokens.clone()
        labels[:, : index + 2] = -100
        rows.append(Batch.of(labels, input_ids=tokens))
    return rows


def context_of(rank: int = 0, world_size: int = 1, others: tuple[Any, ...] = ()) -> Any:
    """One rank, and what the others gather."""
    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        gather=lambda value: [value, *others],
    )


def scores_of(config: RunConfig, context: Any = None) -> dict[str, float]:
    return gradient_scores(config, backbone_of(config), batches(), context or context_of())


def test_scores_are_squared_norms_of_the_gradients_of_lora_b() -> None:
    config = run_config()
    found = scores_of(config)
    adapted = add_adapters(backbone_of(config), candidates(config.adapter), seed=3)
    starts = {name: p.detach() for name, p in adapter_parameters(adapted).items() if "lora_A" in name}
    # The same by the gradient of the frozen weight itself: dW_b = s dW A^T.
    plain = backbone_of(config).train()
    plain.requires_grad_(True)
    expected: dict[str, float] = {}
    for batch in batches():
        plain.zero_grad()
        logits = plain(**batch.inputs).logits.flatten(0, 1)[batch.places]
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
        for name, lora_A in starts.items():
            module = name.removesuffix(".lora_A.weight")
            gradient = config.adapter.scaling * plain.get_submodule(module).weight.grad @ lora_A.T
            _, _, index, *_, projection = module.split(".")
            place = f"{index}.{projection}"
            expected[place] = expected.get(place, 0.0) + gradient.square().sum().item() / 3
    assert found.keys() == expected.keys()
    assert len(found) == 7 * NUM_LAYERS
    assert found == pytest.approx(expected, rel=SCORE_TOLERANCE)
    assert min(found.values()) > 0


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_checkpointing_changes_no_bit(quantization: str) -> None:
    found = [
        scores_of(run_config({"gradient_checkpointing": each}, quantization=quantization))
        for each in (True, False)
    ]
    assert found[0] == found[1]


def test_ranks_share_the_work_and_agree() -> None:
    config = run_config()
    alone = scores_of(config)
    seen: list[Any] = []
    second = context_of(1, 2)
    second.gather = lambda value: seen.append(value) or [value, {0: {}, 2: {}}]
    with pytest.raises(KeyError):
        scores_of(config, second)
    assert [list(each) for each in seen] == [[1]]
    assert scores_of(config, context_of(0, 2, (seen[0],))) == alone


def test_float16_is_scaled() -> None:
    half, full = (scores_of(run_config(compute_dtype=dtype)) for dtype in ("float16", "float32"))
    assert half == pytest.approx(full, rel=HALF_TOLERANCE)


def test_a_scale_that_is_too_large_is_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(compute_dtype="float16")
    expected = scores_of(config)
    monkeypatch.setattr(probe, "LossScale", lambda: LossScale(2.0**40))
    passes = mock.Mock(wraps=probe.squared_norms)
    monkeypatch.setattr(probe, "squared_norms", passes)
    assert scores_of(config) == pytest.approx(expected, rel=HALF_TOLERANCE)
    values = [call.args[1] for call in passes.call_args_list]
    # Of the first micro-batch until its gradients are finite; a later one may have larger gradients.
    assert values == sorted(values, reverse=True)
    assert 2**12 < values[0] / values[-1] == 2 ** (len(values) - len(batches()))


def test_gradients_that_no_scale_makes_finite_are_refused() -> None:
    config = run_config(compute_dtype="float16")
    backbone = backbone_of(config)
    with torch.no_grad():
        backbone.model.layers[1].mlp.up_proj.weight.fill_(60000)
    with pytest.raises(TrainingError, match="not finite"):
        gradient_scores(config, backbone, batches(), context_of())


def test_a_loss_that_is_not_finite_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        CausalLMLoss, "forward", lambda self, _: torch.tensor(torch.inf) + ones_of(self.model)
    )
    with pytest.raises(TrainingError, match="not finite"):
        scores_of(run_config())


def ones_of(model: Any) -> Tensor:
    """0, of which the gradient of every adapter's parameter is 1."""
    return sum((p.sum() - p.detach().sum()) for p in adapter_parameters(model).values())  # type: ignore[return-value]


def test_the_backbone_is_left_as_it_was() -> None:
    config = run_config(quantization="nf4")
    backbone = backbone_of(config)
    modules, training = [type(module) for module in backbone.modules()], backbone.training
    tokens = token_ids(2, 9)
    before = backbone(input_ids=tokens).logits
    places = probe_places(config, backbone, batches(), context_of())
    assert [type(module) for module in backbone.modules()] == modules
    assert backbone.training == training
    assert torch.equal(backbone(input_ids=tokens).logits, before)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    add_adapters(backbone, config.with_places(places).adapter)
    assert backbone.ssmlora_config.places == places


@pytest.mark.parametrize("settings", [{}, {"probe_parameters": 1000}, {"layers": "-2:", "method": "lora"}])
def test_the_parameters_are_spent(settings: dict[str, Any]) -> None:
    config = run_config(adapter=settings)
    check_model(config)
    budget = probe_budget(config)
    places = probe_places(config, backbone_of(config), batches(), context_of())
    assert places == probe_places(config, backbone_of(config), batches(), context_of())
    adapted = adapter_parameters(add_adapters(backbone_of(config), config.with_places(places).adapter))
    # The smallest adapter, of 16 -> 8, has 4 x 24 parameters, and two of 4 x 4 where it has a state.
    assert budget - 128 < sum(parameter.numel() for parameter in adapted.values()) <= budget
    if "layers" in settings:
        assert {place[0] for place in places} == {"2", "3"}
    else:
        assert {place[0] for place in places} == {"0", "1", "2", "3"}


def test_other_data_choose_other_places() -> None:
    config, context = run_config(), context_of()
    backbone = backbone_of(config)
    first, second = (probe_places(config, backbone, batches(seed=seed), context) for seed in (0, 100))
    assert first != second
    assert first == probe_places(config, backbone, batches(seed=0), context)


def test_too_few_parameters_are_refused() -> None:
    with pytest.raises(
        AdapterError, match=r"`probe_parameters` 10 .*; the smallest adapter, in 0\.k_proj, has 128"
    ):
        check_model(run_config(adapter={"probe_parameters": 10}))


def test_gradients_that_are_not_finite_stop_the_run() -> None:
    config = run_config()
    backbone = backbone_of(config)
    with torch.no_grad():
        backbone.model.norm.weight.fill_(torch.inf)
    with pytest.raises(TrainingError, match="the probe's gradients are not finite"):
        probe_places(config, backbone, batches(), context_of())
    assert not adapter_parameters(backbone)
