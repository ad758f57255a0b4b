"""What a run or an evaluation is, in a line for each fact: shown at its start, and by `--dry-run`."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssmlora_dist.adapters.config import AdapterConfig, split_place
from ssmlora_dist.adapters.injection import adapter_parameters
from ssmlora_dist.adapters.projections import linear_layers, named_by, skipped_layers
from ssmlora_dist.adapters.tiling import untiled_layers
from ssmlora_dist.config.build import attention_of, build_store, meta_model, probe_budget, shapes_of
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import data_parallel_size, gradient_accumulation_steps
from ssmlora_dist.models import decoder_layers, empty_model, max_positions, structure_of
from ssmlora_dist.models.configuration import stored_quantization
from ssmlora_dist.models.loading import attention_implementation
from ssmlora_dist.quantization import expert_weights
from ssmlora_dist.tracking import is_installed
from ssmlora_dist.training.planner import planned_text
from ssmlora_dist.training.resume_point import ResumePoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH = 13
_CPU_INFO = Path("/proc/cpuinfo")
GIB = 2**30


def run_header(
    config: RunConfig,
    device: torch.device,
    world_size: int,
    *,
    num_steps: int,
    num_examples: int | None,
    num_rows: int | None,
    accounts: Sequence[str],
    resume_point: ResumePoint,
) -> str:
    """The facts of a training run.

    Args:
        config: of the run.
        device: where rank 0 computes.
        world_size: number of ranks.
        num_steps: optimiser steps in all.
        num_examples: that are trained on; None: of a stream, not known.
        num_rows: that hold them.
        accounts: lines about what became of the data.
        resume_point: where the run begins.
    """
    training, section = config.training, config.parallel
    model = meta_model(config)
    replicas = data_parallel_size(config, world_size)
    stages = section.pipeline_stages
    accumulation = gradient_accumulation_steps(config, world_size)
    ranks = [f"{world_size} = {replicas} data parallel x {stages} stages" if stages > 1 else f"{world_size}"]
    ranks.append(f"ZeRO stage {section.zero_stage}")
    offloaded = [what for what in ("optimizer", "parameters") if getattr(section, f"offload_{what}")]
    ranks += [f"{' and '.join(offloaded)} in host memory"] if offloaded else []
    steps = f"{num_steps}"
    if num_examples and num_rows:
        epochs = num_steps * training.global_batch_size / num_rows
        steps += f" = {epochs:.2f} epochs of {num_examples} examples"
        steps += f" in {num_rows} packed rows" if config.data.packing else ""
    lines = [
        _line("device", device_text(device)),
        _line("ranks", ", ".join(ranks)),
        *model_lines(config, device, model),
        *adapter_lines(config, model),
        _line(
            "batch",
            f"{training.global_batch_size} = {replicas} {'replicas' if stages > 1 else 'ranks'} x "
            f"{accumulation} micro-batches x {training.micro_batch_size} sequences",
        ),
        _line("recompute", recompute_text(config, model)),
        _line("memory", planned_text(config, world_size, model)),
        _line("steps", steps),
        *accounts,
        _line("writes to", str(config.run.output_dir / config.run.name)),
        tracking_line(config),
        _line("begins", _beginning(resume_point)),
    ]
    return "\n".join(lines)


def recompute_text(config: RunConfig, model: PreTrainedModel) -> str:
    """What is recomputed in the backward pass, and from what."""
    training, spared = config.training, config.training.spared
    parts = ["nothing"]
    if training.gradient_checkpointing:
        number, place = spared.layers_per_checkpoint, " in host memory" * spared.offload_checkpoints
        parts = [f"{number} layers at a time" if number > 1 else "layer by layer"]
        parts[0] += f", from checkpoints{place}" if place else ""
    if (tile_size := spared.mlp_tile_size) is not None:
        parts.append(f"MLPs and norms in tiles of {tile_size} tokens")
        if left := untiled_layers(decoder_layers(model)):
            parts[-1] += f", MLPs whole in {len(left)} layers with experts or without an MLP of its own"
    if training.compile:
        parts.append("decoder layers are compiled")
    return "; ".join(parts)


def adapter_lines(config: RunConfig, model: PreTrainedModel) -> list[str]:
    """What is adapted, and how many parameters are trained; before a probe, those that it replaces."""
    adapter = config.adapter
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trainable
    adapted, parameters = adapted_text(model), f"{trainable:,} trained, {frozen:,} frozen"
    if adapter.is_unprobed:
        adapted = (
            f"{adapter.method} in places that a probe of {adapter.probe_batches} micro-batches is going to "
            f"choose, with at most {probe_budget(config):,} parameters; planned as configured: {adapted}"
        )
        parameters += ", as configured"
    return [_line("adapts", adapted), _line("parameters", parameters)]


def evaluation_header(
    config: RunConfig,
    device: torch.device,
    world_size: int,
    *,
    adapter: Path | None,
    tasks: Sequence[str],
    directory: Path,
) -> str:
    """The facts of an evaluation on tasks.

    Args:
        config: of a run.
        device: where rank 0 computes.
        world_size: number of ranks.
        adapter: that is evaluated, if any.
        tasks: lines about their items.
        directory: where results go.
    """
    lines = [
        _line("device", device_text(device)),
        _line("ranks", f"{world_size}, each with the whole model"),
        *model_lines(config, device, empty_model(shapes_of(config.model))),
        _line("adapter", "none" if adapter is None else str(adapter)),
        *tasks,
        _line("writes to", str(directory)),
        tracking_line(config),
    ]
    return "\n".join(lines)


def model_lines(config: RunConfig, device: torch.device, model: PreTrainedModel) -> list[str]:
    """What the backbone is, and how it is stored and computed with; `model` is it without storage."""
    section = config.model
    dtype = section.compute_dtype
    chosen = attention_of(config, model.config)
    attention = attention_implementation(chosen, model.config, device, getattr(torch, dtype))
    name = "random weights" if section.init == "random" else section.path
    return [
        _line("model", f"{name} ({model.config.model_type})"),
        *_rope_lines(config, model),
        _line("computes in", f"{dtype}, attention {attention}"),
        _line("quantised", _quantization_text(config, model)),
    ]


def _rope_lines(config: RunConfig, model: PreTrainedModel) -> list[str]:
    setting = config.model.rope_parameters
    if setting is None:
        return []
    text = f"{setting.rope_type} x {setting.factor:g}, to {max_positions(model.config):,} positions"
    return [_line("RoPE", text)]


def _quantization_text(config: RunConfig, model: PreTrainedModel) -> str:
    section, mode = config.model, config.quantization.mode
    read_from = None
    if section.path is not None and section.init == "pretrained":
        read_from = stored_quantization(section.path, section.revision)
    if mode == "none":
        dense = f"none (the experts, stored in {read_from}, become {section.compute_dtype})"
        return dense if read_from else "none"
    has_experts = any(expert_weights(module) for module in model.modules())
    experts = " and experts" + (f" (these are stored in {read_from})" if read_from else "")
    text = f"{mode} of the projections{experts if has_experts else ''}"
    if mode in ("nf4", "fp4") and config.quantization.double_quantization:
        text += ", scales in 8 bits too"
    return text


def adapted_text(model: PreTrainedModel) -> str:
    """Which linear layers carry an adapter, with their widths: a fused or grouped one shows by them.

    Args:
        model: adapted.
    """
    config: AdapterConfig = model.ssmlora_config
    structure = structure_of(model)
    layers = [linear_layers(layer) for layer in decoder_layers(model).values()]
    skipped = skipped_layers(config, structure.linears)

    def widths(name: str) -> str:
        found = [own[path] for own in layers for path in named_by(name, list(own))]
        sizes = dict.fromkeys(f"{linear.in_features} -> {linear.out_features}" for linear in found)
        lacking = f", not in layers {', '.join(map(str, skipped[name]))}" if name in skipped else ""
        return f"{name} ({' or '.join(sizes)}{lacking})"

    whole = f"; whole: {', '.join(config.modules_to_save)}" if config.modules_to_save else ""
    parts = []
    if config.places:
        layers_of: dict[str, list[int]] = {}
        for index, name in map(split_place, config.places):
            layers_of.setdefault(name, []).append(index)
        parts = [f"{widths(name)} in layers {_ranges(own)}" for name, own in layers_of.items()]
        return f"{config.method} in {len(config.places)} places: {'; '.join(parts)}{whole}"
    if config.alternate:
        parts.append(f"{config.method} in turn on {', '.join(map(widths, config.alternate))}")
    if config.listed:
        parts.append(f"{config.every_layer_method} on {', '.join(map(widths, config.listed))}")
    where = "" if config.layer_indices is None else f", in layers {_ranges(config.layer_indices)}"
    return "; ".join(parts) + where + whole


def _ranges(indices: Iterable[int]) -> str:
    """`0-2, 5` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def tracking_line(config: RunConfig) -> str:
    """Where it is recorded."""
    store = build_store(config)
    if store is not None and is_installed():
        return _line("recorded", f"MLflow at {store}")
    return _line("recorded", "in its own files alone" + (": MLflow is not installed" if store else ""))


def device_text(device: torch.device) -> str:
    """Its kind, name and size."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"cuda, {properties.name}, {properties.total_memory / GIB:.0f} GiB"
    names = re.findall(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.M) if _CPU_INFO.exists() else []
    name = names[0] if names else platform.machine()
    num_cores = len(os.sched_getaffinity(0))
    return f"cpu, {name}, {num_cores} cores, {torch.get_num_threads()} threads"


def _line(name: str, value: str) -> str:
    return f"{name:<{WIDTH}}{value}"


def _beginning(resume_point: ResumePoint) -> str:
    if resume_point.path is None:
        return "at step 0"
    new_run = "" if resume_point.in_place else ", as a new run"
    return f"after step {resume_point.step}, from {resume_point.path}{new_run}"
