"""A pipeline stage in one piece and in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmlora_dist import add_adapters
from ssmlora_dist.batches import Batch
from ssmlora_dist.models.loss import checkpoint_layers
from ssmlora_dist.models.stage import PipelineStage, StageLayers, cut_to_stage

from ..tiny import QV_AND_MLP, tiny_model

NUM_LAYERS = 5
INPUT_IDS = torch.arange(24).view(2, 12)
INPUTS = {
    "input_ids": INPUT_IDS,
    "position_ids": torch.arange(12).expand(2, 12),
}
BATCH = Batch.of(INPUT_IDS, **INPUTS)


def stage_of(first: int, stop: int, num_ahead: int | None, **changes: Any) -> PipelineStage:
    """Layers `first` to `stop` of an adapted model that is the same at every call."""
    torch.manual_seed(0)
    model = add_adapters(tiny_model(num_layers=NUM_LAYERS, **changes), QV_AND_MLP, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    stage = StageLayers(first, stop, NUM_LAYERS)
    cut_to_stage(model, stage)
    return PipelineStage(model, stage, 8, num_ahead)


def received_by(stage: PipelineStage) -> Tensor | None:
    if stage.stage.is_first:
        return None
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 12, stage.boundary_width, generator=generator).requires_grad_()


def test_the_last_stage_takes_the_models_own_logits_where_its_head_does_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = type(tiny_model(num_layers=1))
    forward = owner.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = 3 * output.logits
        return output

    plain = stage_of(0, NUM_LAYERS, None)(None, BATCH)
    monkeypatch.setattr(owner, "forward", scaled)
    whole, first, last = (stage_of(*place, None) for place in ((0, NUM_LAYERS), (0, 2), (2, NUM_LAYERS)))
    expected = whole(None, BATCH)
    assert abs(expected - plain) > 1
    assert torch.equal(last(first(None, BATCH), BATCH), expected)


@pytest.mark.parametrize("num_ahead", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize(("first", "stop"), [(0, 3), (1, 4)])
def test_two_pieces_compute_what_one_does(first: int, stop: int, num_ahead: int | None) -> None:
    whole, split = stage_of(first, stop, None), stage_of(first, stop, num_ahead)
    assert [name for name, _ in whole.named_parameters()] == [name for name, _ in split.named_parameters()]
    expected = whole(received_by(whole), BATCH)
    assert torch.equal(split(received_by(split), BATCH), expected)
    received = received_by(split)
    begun = split.begin(received, BATCH)
    # All at once, and nothing of it at the boundary of what `finish` runs.
    assert (begun is received) == (num_ahead not in (1, 2))
    assert torch.equal(split.finish(begun, BATCH), expected)


@pytest.mark.parametrize(
    ("num_ahead", "in_begin", "in_finish"), [(None, 0, 3), (1, 2, 1), (2, 1, 2), (9, 0, 3)]
)
def test_each_layer_runs_in_one_of_them(num_ahead: int | None, in_begin: int, in_finish: int) -> None:
    stage = stage_of(1, 4, num_ahead)
    runs: list[int] = []
    for index, layer in enumerate(stage.model.get_decoder().layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    begun = stage.begin(received_by(stage), BATCH)
    assert runs == list(range(in_begin))
    stage.finish(begun, BATCH)
    assert runs == list(range(in_begin + in_finish))


@pytest.mark.parametrize(("num_kept", "recomputed"), [(0, [2, 1, 0]), (1, [1, 0]), (3, []), (9, [])])
def test_the_layers_kept_are_not_recomputed(num_kept: int, recomputed: list[int]) -> None:
    stage = stage_of(1, 4, None).train()
    checkpoint_layers(stage.model, num_kept)
    runs: list[int] = []
    for index, layer in enumerate(stage.model.get_decoder().layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    output = stage(received_by(stage), BATCH)
    assert runs == [0, 1, 2]
    output.sum().backward()
    assert runs[3:] == recomputed
