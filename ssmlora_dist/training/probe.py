"""Choosing where adapters go by gradients on training data, before training: the measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.probe import candidate_places, candidates, choose_places
from ssmlora_dist.api import add_adapters, remove_adapters
from ssmlora_dist.batches import Batch
from ssmlora_dist.config.build import probe_budget
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.distributed.engine import on_host, squared_norms
from ssmlora_dist.distributed.loss_scale import LossScale
from ssmlora_dist.errors import TrainingError
from ssmlora_dist.models import decoder_layers, structure_of
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.progress import counted
from ssmlora_dist.training.memory import spare_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def probe_places(
    config: RunConfig, backbone: PreTrainedModel, batches: Sequence[Batch], context: DistributedContext
) -> tuple[str, ...]:
    """The places to adapt, the same on every rank and for any number of ranks.

    Args:
        config: of the run; its `adapter` has the parameters to spend, and which layers may be adapted.
        backbone: whole, without adapters; left as it was.
        batches: the micro-batches, all of them, on every rank; the ranks share the work.
        context: the run's processes.

    Raises:
        TrainingError: a gradient is not finite.
    """
    layers, paths = decoder_layers(backbone), structure_of(backbone).linears
    sizes = {place: size for place, (_, size) in candidate_places(config.adapter, layers, paths).items()}
    return choose_places(gradient_scores(config, backbone, batches, context), sizes, probe_budget(config))


def gradient_scores(
    config: RunConfig, backbone: PreTrainedModel, batches: Sequence[Batch], context: DistributedContext
) -> dict[str, float]:
    """Of every place that may be adapted, in the order of the model; the arguments are `probe_places`'.

    The squared norm of the gradient of `lora_B`, of a micro-batch's mean loss over its target tokens; the
    mean over the micro-batches. In float16 what is too small for the loss scale may depend on the number of
    ranks, as each has a scale of its own.
    """
    structure = structure_of(backbone)
    found = candidate_places(config.adapter, decoder_layers(backbone), structure.linears)
    modules = {place: f"{structure.layers}.{module}" for place, (module, _) in found.items()}
    was_training = backbone.training
    model = add_adapters(backbone, candidates(config.adapter), seed=config.run.seed)
    try:
        spare_memory(config, model)
        named = adapter_parameters(model)
        measured = {place: named[f"{module}.lora_B.weight"] for place, module in modules.items()}
        for parameter in named.values():
            parameter.requires_grad_(False)
        for parameter in measured.values():
            parameter.requires_grad_(True)
        loss = CausalLMLoss(model, config.training.loss_chunk_size).train()
        scale = LossScale() if config.model.compute_dtype == "float16" else None
        own = range(context.rank, len(batches), context.world_size)
        squares = {}
        for index in counted(own, "probing where to adapt", len(own)):
            # Of what the backbone drops itself.
            torch.manual_seed(config.run.seed + index)
            squares[index] = _squared_norms(loss, batches[index].to(context.device), measured, scale)
    finally:
        remove_adapters(model).train(was_training)
    by_index = {index: each for rank in context.gather(squares) for index, each in rank.items()}
    scores = {
        # In the order of the micro-batches, whichever ranks had them.
        place: sum(by_index[index][place] for index in range(len(batches))) / len(batches)
        for place in measured
    }
    if not all(map(math.isfinite, scores.values())):
        raise TrainingError(
            "adapter.placement: the probe's gradients are not finite; look for damaged data, set "
            'model.compute_dtype to "float32", or name adapter.places'
        )
    return scores


def _squared_norms(
    loss: CausalLMLoss, batch: Batch, parameters: Mapping[str, nn.Parameter], scale: LossScale | None
) -> dict[str, float]:
    """By name, of the gradients of the mean loss over the target tokens."""
    while True:
        value = 1.0 if scale is None else scale.value
        total = loss(batch)
        # 0 x infinity: a loss that is not finite makes the gradients so.
        (total * (value / batch.num_targets + 0.0 * total.detach())).backward()
        squares = on_host(squared_norms(parameters, value))
        for parameter in parameters.values():
            parameter.grad = None
        norm = math.sqrt(sum(squares.values()))
        if scale is None or not scale.update(float(total.detach()), norm):
            return squares
