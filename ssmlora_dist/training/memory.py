"""Where a run's model spends time or host memory to need less on the device: one reader of these settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ssmlora_dist.adapters.tiling import tile_layers
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.models.loss import checkpoint_layers
from ssmlora_dist.models.structure import decoder_layers, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def spare_memory(config: RunConfig, model: PreTrainedModel, num_kept: int = 0) -> None:
    """Sets up checkpoints and tiles, in place.

    Args:
        config: of the run.
        model: adapted; all of it, or a pipeline stage.
        num_kept: how many of its layers, the last ones, keep their activations.
    """
    training, spared = config.training, config.training.spared
    if training.gradient_checkpointing:
        checkpoint_layers(model, num_kept, spared.layers_per_checkpoint, offload=spared.offload_checkpoints)
    if spared.mlp_tile_size is not None:
        num_tiles = None
        if config.parallel.zero_stage == 3:
            # Modules gather their weights when called, which every rank must do equally often.
            rows = max(training.micro_batch_size, config.evaluation.micro_batch_size)
            tokens = rows * math.ceil(config.data.max_length / config.parallel.sequence_parallel)
            num_tiles = math.ceil(tokens / spared.mlp_tile_size)
        behind = map(model.get_submodule, structure_of(model).after)
        tile_layers(decoder_layers(model), spared.mlp_tile_size, num_tiles, behind)
