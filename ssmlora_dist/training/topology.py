"""The engine for a topology, and the part of the model that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.placement import time_axes
from ssmlora_dist.adapters.state import join_stages
from ssmlora_dist.config.build import build_model, meta_model
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import data_parallel_size, gradient_accumulation_steps
from ssmlora_dist.data import Dataset
from ssmlora_dist.distributed.cost_model import (
    AdapterShape,
    DecoderShape,
    Workload,
    bytes_per_weight,
    model_costs,
)
from ssmlora_dist.distributed.ds_config import deepspeed_config
from ssmlora_dist.distributed.engine import DataParallelEngine
from ssmlora_dist.distributed.partition import check_boundaries, partition, stage_table
from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.models.families import decoder_layers
from ssmlora_dist.models.loss import CausalLMLoss, checkpoint_layers
from ssmlora_dist.models.stage import PipelineStage, StageLayers
from ssmlora_dist.training.loop import Engine
from ssmlora_dist.training.optimizer import build_optimizer


class TopologyEngine(Engine, Protocol):
    """What a run needs of a topology."""

    @property
    def module(self) -> nn.Module:
        """The part of the model that this rank holds."""

    def score(self, batches: Iterable[Mapping[str, Tensor]]) -> list[Any]:
        """`models.loss.Scores` of each of this replica's batches, on every rank that works on them."""

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The trained parameters by full name, whole, on the CPU."""


@dataclass(frozen=True)
class Place:
    """This rank in the topology: rank = stage * data_parallel_size + data_parallel_rank.

    Attributes:
        data_parallel_rank: which share of the global batch it works on.
        data_parallel_size: number of shares.
        stage: which pipeline stage it holds.
        num_stages: number of stages.
    """

    data_parallel_rank: int
    data_parallel_size: int
    stage: int
    num_stages: int


def place_of(config: RunConfig, group: ProcessGroup) -> Place:
    """Where DeepSpeed's pipeline topology puts this rank."""
    size = data_parallel_size(config, group.world_size)
    return Place(group.rank % size, size, group.rank // size, config.parallel.pipeline_stages)


def stage_boundaries(config: RunConfig, train_data: Dataset, place: Place) -> tuple[tuple[int, ...], str]:
    """First layer of every stage, as configured or balanced, and the table of what each stage holds.

    Raises:
        ConfigError: more stages than layers, or boundaries that skip or repeat a layer.
    """
    model = meta_model(config)
    shape = _decoder_shape(model.config)
    trained = [0] * shape.num_layers
    for index, layer in decoder_layers(model).items():
        trained[index] = sum(parameter.numel() for parameter in adapter_parameters(layer).values())
    adapter, training = config.adapter, config.training
    dtype_bytes = getattr(torch, config.model.compute_dtype).itemsize
    num_tokens = sum(example.num_tokens for example in train_data.examples) // len(train_data)
    num_targets = max(1, sum(example.num_targets for example in train_data.examples) // len(train_data))
    ahead = "while_waiting" if config.parallel.recompute_ahead else "on_gradient"
    costs = model_costs(
        shape,
        AdapterShape(tuple(trained), len(time_axes(adapter)), adapter.rank, dtype_bytes),
        Workload(
            sequence_length=num_tokens,
            micro_batch_size=training.micro_batch_size,
            num_micro_batches=training.global_batch_size
            // (training.micro_batch_size * place.data_parallel_size),
            supervised_tokens=num_targets,
            loss_chunk_size=training.loss_chunk_size,
            recompute=ahead if training.gradient_checkpointing else "none",  # type: ignore[arg-type]
        ),
        bytes_per_linear_weight=bytes_per_weight(
            config.quantization.mode,
            double_quantization=config.quantization.double_quantization,
            compute_dtype_bytes=dtype_bytes,
        ),
        compute_dtype_bytes=dtype_bytes,
    )
    given = config.parallel.stage_boundaries
    if given is not None:
        chosen = check_boundaries(given, num_layers=shape.num_layers, num_stages=place.num_stages)
    else:
        chosen = partition(costs, place.num_stages)
    return chosen, stage_table(costs, chosen)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, and what the run reports of it.

    Attributes:
        engine: ready to train.
        model_config: of the whole backbone.
        num_trainable: trained parameters of this rank's stage.
    """

    engine: TopologyEngine
    model_config: Any
    num_trainable: int


def build_engine(
    config: RunConfig, group: ProcessGroup, place: Place, boundaries: Sequence[int] | None
) -> BuiltEngine:
    """Loads this rank's part of the backbone, adapts it and hands it to the topology's engine."""
    training, parallel = config.training, config.parallel
    engine_config = deepspeed_config(
        zero_stage=parallel.zero_stage,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps(config, group.world_size),
        max_grad_norm=training.max_grad_norm,
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        native=config.deepspeed,
    )
    stage = None
    if boundaries is not None:
        num_layers = meta_model(config).config.num_hidden_layers
        ends = [*boundaries[1:], num_layers]
        stage = StageLayers(boundaries[place.stage], ends[place.stage], num_layers)
    model = build_model(config, group.device, stage)
    ahead = stage is not None and parallel.recompute_ahead
    if training.gradient_checkpointing and not ahead:
        checkpoint_layers(model)
    parameters = adapter_parameters(model)
    optimizer = build_optimizer(
        training.optimizer,
        parameters,
        learning_rate=training.learning_rate,
        betas=training.betas,
        epsilon=training.epsilon,
        weight_decay=training.weight_decay,
    )
    num_trainable = sum(parameter.numel() for parameter in parameters.values())
    engine: TopologyEngine
    if stage is None:
        module = CausalLMLoss(model, training.loss_chunk_size)
        engine = DataParallelEngine(
            module, parameters, optimizer, engine_config, group, training.max_grad_norm
        )
        return BuiltEngine(engine, model.config, num_trainable)

    # Imported here, as it imports deepspeed.
    from ssmlora_dist.distributed.pipeline import PipelineParallelEngine

    width = join_stages(
        decoder_layers(model).values(), model.config.hidden_size, stage.is_first, stage.is_last
    )
    engine = PipelineParallelEngine(
        PipelineStage(model, stage, training.loss_chunk_size),
        width,
        getattr(torch, config.model.compute_dtype),
        place.num_stages,
        parameters,
        optimizer,
        engine_config,
        group,
        training.max_grad_norm,
        recompute_ahead=ahead and training.gradient_checkpointing,
    )
    return BuiltEngine(engine, model.config, num_trainable)


def _decoder_shape(config: Any) -> DecoderShape:
    heads = config.num_attention_heads
    return DecoderShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
    )
