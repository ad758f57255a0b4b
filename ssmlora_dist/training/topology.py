"""The engine for a topology, and the part of the model that this rank holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ssmlora_dist.adapters.config import AdapterConfig
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.layers import LoRALinear
from ssmlora_dist.adapters.placement import time_axes
from ssmlora_dist.adapters.projections import linear_layers
from ssmlora_dist.adapters.tiling import find_mlp
from ssmlora_dist.api import add_adapters
from ssmlora_dist.batches import Batch
from ssmlora_dist.config.build import build_model, meta_model
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import data_parallel_size, gradient_accumulation_steps
from ssmlora_dist.data import BatchShape, Dataset
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.distributed.cost_model import (
    AdapterShape,
    KeptInputs,
    ModelCosts,
    Workload,
    bytes_per_weight,
    model_costs,
)
from ssmlora_dist.distributed.ds_config import deepspeed_config
from ssmlora_dist.distributed.engine import DataParallelEngine
from ssmlora_dist.distributed.loading import swap_rows, zero3_partitioner
from ssmlora_dist.distributed.loss_scale import LossScale
from ssmlora_dist.distributed.optimizer_state import OptimizerState
from ssmlora_dist.distributed.partition import (
    check_boundaries,
    most_layers_ahead,
    partition,
    stage_layers,
    stage_table,
)
from ssmlora_dist.distributed.sequence import SequenceGroup
from ssmlora_dist.errors import CheckpointError, ConfigError
from ssmlora_dist.models.attention import EXCHANGE
from ssmlora_dist.models.loss import CausalLMLoss
from ssmlora_dist.models.recompute import compile_layers
from ssmlora_dist.models.stage import PipelineStage, StageLayers
from ssmlora_dist.models.structure import decoder_layers, structure_of
from ssmlora_dist.progress import progress
from ssmlora_dist.sizes import DecoderShape
from ssmlora_dist.training.checkpoints import Checkpoint
from ssmlora_dist.training.loop import Engine
from ssmlora_dist.training.memory import spare_memory
from ssmlora_dist.training.optimizer import build_optimizer, unpaged_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TopologyEngine(Engine, Protocol):
    """What a run needs of a topology."""

    @property
    def module(self) -> nn.Module:
        """The part of the model that this rank holds."""

    def rehearse(self, micro_batches: Sequence[Batch]) -> None:
        """Takes the memory of a step on these micro-batches, and updates nothing."""

    def score(self, batches: Iterable[Batch]) -> list[Any]:
        """`models.loss.Scores` of each of this replica's batches, on every rank that works on them."""

    @property
    def loss_scale(self) -> LossScale | None:
        """What the loss is multiplied with in float16; None in other dtypes."""

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The trained parameters by full name, whole, on rank 0's CPU; elsewhere none."""

    def optimizer_state(self) -> OptimizerState:
        """What the optimiser has learnt of them, on rank 0."""

    def restore(self, optimizer_state: OptimizerState) -> None:
        """Goes on with it, before the first step."""


@dataclass(frozen=True)
class ParallelDims:
    """This rank in the topology.

    rank = (stage * data_parallel_size + data_parallel_rank) * sequence_size + sequence_rank.

    Attributes:
        data_parallel_rank: which share of the global batch it works on.
        data_parallel_size: number of shares.
        stage: which pipeline stage it holds.
        num_stages: number of stages.
        sequence_rank: which part of its rows it computes.
        sequence_size: number of ranks that share rows.
    """

    data_parallel_rank: int
    data_parallel_size: int
    stage: int
    num_stages: int
    sequence_rank: int = 0
    sequence_size: int = 1

    @property
    def num_copies(self) -> int:
        """How many ranks have the scores of the same rows."""
        return self.num_stages * self.sequence_size

    def batch_shape(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        pad_token_id: int,
        dropout_seed: int | None = None,
    ) -> BatchShape:
        """This rank's share of global batches."""
        return BatchShape(
            global_batch_size,
            micro_batch_size,
            self.data_parallel_rank,
            self.data_parallel_size,
            pad_token_id,
            dropout_seed,
            self.sequence_rank,
            self.sequence_size,
        )

    @property
    def opposite_rank(self) -> int | None:
        """The rank at the other end of this replica's pipeline; None between the ends, or without stages."""
        last = self.num_stages - 1
        if last == 0 or 0 < self.stage < last:
            return None
        return (last - self.stage) * self.data_parallel_size + self.data_parallel_rank


def parallel_dims_of(config: RunConfig, context: DistributedContext) -> ParallelDims:
    """Where DeepSpeed's pipeline topology puts this rank; those that share rows follow each other."""
    size, parallel = data_parallel_size(config, context.world_size), config.parallel
    replica, sequence_rank = divmod(context.rank, parallel.sequence_parallel)
    stage, data_parallel_rank = divmod(replica, size)
    return ParallelDims(
        data_parallel_rank, size, stage, parallel.pipeline_stages, sequence_rank, parallel.sequence_parallel
    )


@dataclass(frozen=True)
class StagePlan:
    """How the decoder layers are split over pipeline stages.

    Attributes:
        layers: of every stage.
        layers_ahead: of each stage, how many layers are recomputed while it waits for its gradient.
        table: what each stage holds, to be shown.
    """

    layers: tuple[range, ...]
    layers_ahead: int
    table: str


def plan_stages(
    config: RunConfig, sample: Dataset, dims: ParallelDims, memory_limit_bytes: float = math.inf
) -> StagePlan:
    """The split, as configured or balanced, and how much is recomputed ahead.

    Args:
        config: of the run.
        sample: of the training data; time is counted for an example of mean length, memory for the longest.
        dims: of any rank.
        memory_limit_bytes: that a stage may hold, for `parallel.recompute_ahead: "auto"`.

    Raises:
        ConfigError: more stages than layers, boundaries that skip or repeat a layer, or a stage without an
            adapter.
    """
    lengths = sample.lengths
    num_targets = sample.num_targets // len(lengths)
    sizes, replicas = ModelSizes.of(config), dims.data_parallel_size
    costs = sizes.costs(
        config, replicas, int(lengths.sum(dtype=np.int64)) // len(lengths), max(1, num_targets)
    )
    num_layers, num_stages = len(costs.layers), dims.num_stages
    given = config.parallel.stage_boundaries
    if given is not None:
        boundaries = check_boundaries(given, num_layers=num_layers, num_stages=num_stages)
    else:
        boundaries = partition(costs, num_stages)
    for stage, own in enumerate(stage_layers(boundaries, num_layers)):
        if not any(costs.layers[index].adapter_bytes for index in own):
            raise ConfigError(
                [
                    f"parallel.pipeline_stages: {num_stages} given, of which stage {stage} (layers "
                    f"{own.start} to {own.stop - 1}) has no adapter to train; choose "
                    "parallel.stage_boundaries so that every stage has an adapted layer, use fewer stages, "
                    "or adapt more layers"
                ]
            )
    most_tokens = config.data.max_length if config.data.train.streaming else int(lengths.max())
    longest = sizes.costs(config, replicas, most_tokens, max(1, num_targets))
    ahead = costs.layers_ahead
    if not config.training.gradient_checkpointing:
        ahead = 0
    elif ahead is None:
        ahead = most_layers_ahead(longest, boundaries, memory_limit_bytes)
    table = stage_table(replace(longest, layers_ahead=ahead), boundaries)
    return StagePlan(stage_layers(boundaries, num_layers), ahead, table)


@dataclass(frozen=True)
class ModelSizes:
    """An adapted model in numbers, counted once.

    Attributes:
        shape: of the decoder.
        adapters: of what is trained.
        compute_dtype_bytes: of one activation.
        bytes_per_linear_weight: as they are stored.
    """

    shape: DecoderShape
    adapters: AdapterShape
    compute_dtype_bytes: int
    bytes_per_linear_weight: float

    @classmethod
    def of(cls, config: RunConfig, model: PreTrainedModel | None = None) -> ModelSizes:
        """Those of a run's model, from its configuration alone; `model` is `meta_model` of it, if at hand."""
        model = model or meta_model(config)
        structure = structure_of(model)
        trained, kept = [0] * structure.shape.num_layers, [KeptInputs(0, 0, 0)] * structure.shape.num_layers
        for index, layer in decoder_layers(model).items():
            trained[index] = sum(parameter.numel() for parameter in adapter_parameters(layer).values())
            kept[index] = _kept_inputs(layer)
        before, after = (
            sum(p.numel() for part in parts for p in adapter_parameters(model.get_submodule(part)).values())
            for parts in ((structure.embedding, *structure.before), (*structure.after, structure.output_head))
        )
        adapter = model.ssmlora_config
        dtype_bytes = getattr(torch, config.model.compute_dtype).itemsize
        state_bytes = getattr(torch, adapter.state_dtype or config.model.compute_dtype).itemsize
        axes = len(time_axes(adapter))
        return cls(
            structure.shape,
            AdapterShape(tuple(trained), axes, adapter.rank, state_bytes, tuple(kept), before, after),
            dtype_bytes,
            bytes_per_weight(
                config.quantization.mode,
                double_quantization=config.quantization.double_quantization,
                compute_dtype_bytes=dtype_bytes,
            ),
        )

    def costs(
        self, config: RunConfig, data_parallel_size: int, num_tokens: int, num_targets: int
    ) -> ModelCosts:
        """What a run's parts cost, for rows of so many tokens, of which so many are supervised."""
        training, spared, ahead = config.training, config.training.spared, config.parallel.recompute_ahead
        return model_costs(
            self.shape,
            self.adapters,
            Workload(
                sequence_length=num_tokens,
                micro_batch_size=training.micro_batch_size,
                num_micro_batches=training.global_batch_size
                // (training.micro_batch_size * data_parallel_size),
                supervised_tokens=num_targets,
                loss_chunk_size=training.loss_chunk_size,
                recompute="while_waiting" if training.gradient_checkpointing else "none",
                layers_ahead=None if ahead == "auto" else ahead,
                layers_per_checkpoint=spared.layers_per_checkpoint,
                offload_checkpoints=spared.offload_checkpoints,
                mlp_tile_size=spared.mlp_tile_size,
            ),
            bytes_per_linear_weight=self.bytes_per_linear_weight,
            compute_dtype_bytes=self.compute_dtype_bytes,
        )


def _kept_inputs(layer: nn.Module) -> KeptInputs:
    """What the adapters of a decoder layer keep of their inputs, beside what the layer keeps anyway."""
    mlp = find_mlp(layer)
    in_mlp = {path: mlp is not None and path.startswith(f"{mlp}.") for path in linear_layers(layer)}
    attention = [layer.get_submodule(path) for path, inside in in_mlp.items() if not inside]
    of_mlp = [layer.get_submodule(path) for path, inside in in_mlp.items() if inside]

    def widest(modules: Sequence[nn.Module]) -> int:
        return max((module.in_features for module in modules if isinstance(module, LoRALinear)), default=0)

    return KeptInputs(widest(attention[:-1]), widest(of_mlp[:-1]), widest(of_mlp[-1:]))


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, and what the run reports of it.

    Attributes:
        engine: ready to train.
        shape: of the whole backbone.
        adapter: what is adapted, by names of the backbone.
        num_trainable: trained parameters of this rank's stage.
    """

    engine: TopologyEngine
    shape: DecoderShape
    adapter: AdapterConfig
    num_trainable: int


def build_engine(
    config: RunConfig,
    context: DistributedContext,
    dims: ParallelDims,
    plan: StagePlan | None,
    checkpoint: Checkpoint | None = None,
    warn: Callable[[str], object] = warnings.warn,
    backbone: PreTrainedModel | None = None,
) -> BuiltEngine:
    """Loads this rank's part of the backbone, adapts it and hands it to the topology's engine.

    With a checkpoint, parameters and optimiser are as they were in it. `warn` is told of logits that
    cannot be made in chunks, and of moments that are not paged. A whole `backbone` that is loaded already is
    taken as it is.

    Raises:
        CheckpointError: its tensors do not fit.
    """
    training, parallel = config.training, config.parallel
    engine_config = deepspeed_config(
        zero_stage=parallel.zero_stage,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps(config, context.world_size),
        max_grad_norm=training.max_grad_norm,
        num_trained=sum(p.numel() for p in adapter_parameters(meta_model(config)).values()),
        offload_optimizer=parallel.offload_optimizer,
        offload_parameters=parallel.offload_parameters,
        native=config.deepspeed,
    )
    stage = None
    if plan is not None:
        layers = plan.layers[dims.stage]
        stage = StageLayers(layers.start, layers.stop, plan.layers[-1].stop)
    if backbone is not None:
        model = add_adapters(backbone, config.adapter, seed=config.run.seed)
    else:
        model = build_model(
            config,
            context.device,
            stage,
            on_part=zero3_partitioner(engine_config) if parallel.zero_stage == 3 else None,
            swap_rows=None if dims.opposite_rank is None else partial(swap_rows, dims.opposite_rank),
        )
    num_ahead = 0 if plan is None else plan.layers_ahead
    spare_memory(config, model, num_kept=num_ahead)
    if training.compile:
        compile_layers(list(decoder_layers(model).values()))
    parameters = adapter_parameters(model)
    if checkpoint is not None:
        _take(parameters, checkpoint)
    optimizer = build_optimizer(
        training.optimizer,
        parameters,
        learning_rate=training.learning_rate,
        betas=training.betas,
        epsilon=training.epsilon,
        weight_decay=training.weight_decay,
        lora_b_ratio=training.lora_b_learning_rate_ratio,
        state_ratio=training.state_learning_rate_ratio,
    )
    loss_scale = None
    if config.model.compute_dtype == "float16":
        loss_scale = LossScale(**checkpoint.progress["loss_scale"]) if checkpoint else LossScale()
    num_trainable = sum(parameter.numel() for parameter in parameters.values())
    engine: TopologyEngine
    # Where it offloads, DeepSpeed compiles its optimiser once.
    with progress("setting up DeepSpeed"):
        if stage is None:
            module = CausalLMLoss(model, training.loss_chunk_size)
            uses_own_logits = module.uses_own_logits
            sequence_group = SequenceGroup(dims.sequence_size) if dims.sequence_size > 1 else None
            if sequence_group is not None:
                setattr(model, EXCHANGE, sequence_group.attend)
            engine = DataParallelEngine(
                module,
                parameters,
                optimizer,
                engine_config,
                context,
                training.max_grad_norm,
                loss_scale,
                sequence_group,
            )
        else:
            # Imported here, as it imports deepspeed.
            from ssmlora_dist.distributed.pipeline import PipelineParallelEngine

            pipeline_stage = PipelineStage(model, stage, training.loss_chunk_size, num_ahead)
            uses_own_logits = pipeline_stage.loss is not None and pipeline_stage.loss.uses_own_logits
            engine = PipelineParallelEngine(
                pipeline_stage,
                getattr(torch, config.model.compute_dtype),
                dims.num_stages,
                parameters,
                optimizer,
                engine_config,
                context,
                training.max_grad_norm,
                recompute_ahead=num_ahead > 0,
                loss_scale=loss_scale,
            )
    if (unpaged := unpaged_text(optimizer)) is not None:
        warn(unpaged)
    if checkpoint is not None:
        engine.restore(OptimizerState(checkpoint.progress["num_updates"], checkpoint.moments))
    if context.max([float(uses_own_logits)])[0]:
        warn(
            f"{model.config.model_type} models do more to their logits than the output head: they are taken "
            "as the model makes them, all of a micro-batch at once, whatever training.loss_chunk_size is"
        )
    return BuiltEngine(engine, structure_of(model).shape, model.ssmlora_config, num_trainable)


def _take(parameters: Mapping[str, nn.Parameter], checkpoint: Checkpoint) -> None:
    """Copies the values of parameters from a checkpoint, which may hold those of other stages too."""
    for name, parameter in parameters.items():
        value = checkpoint.parameters.get(name)
        if value is None or value.shape != parameter.shape:
            found = "none" if value is None else list(value.shape)
            raise CheckpointError(
                f"checkpoint of step {checkpoint.step}: {name} has the shape {list(parameter.shape)} in the "
                f"model, {found} in the checkpoint; it is of another model or adapter"
            )
        with torch.no_grad():
            parameter.copy_(value)
