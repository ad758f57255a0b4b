"""Which settings of a run go together with which ranks and devices: one table of rules, one pure function.

`python -m ssmlora_dist.config.topology` prints the table as Markdown, for the README.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ssmlora_dist.config.problems import NONE_DOUBTFUL, Doubtful
from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """A configuration and where it is to run.

    Args:
        config: the configuration; rules about a compute dtype that is "auto" are left unjudged.
        world_size: number of ranks.
        device_type: `cuda` or `cpu`; None where it is not known.
        flash_attention_installed: whether the package `flash_attn` is installed; None where not known.
    """

    config: RunConfig
    world_size: int
    device_type: str | None = None
    flash_attention_installed: bool | None = None


@dataclass(frozen=True)
class TopologyRule:
    """One row of the table.

    Args:
        fields: the fields it reads; messages name the first.
        condition: what must hold, in words.
        reason: why.
        remedy: what to change.
        broken: what is given, in words, where the condition does not hold; otherwise None.
    """

    fields: tuple[str, ...]
    condition: str
    reason: str
    remedy: str
    broken: Callable[[Topology], str | None]


def _batch(topology: Topology) -> str | None:
    training = topology.config.training
    at_once = training.micro_batch_size * data_parallel_size(topology.config, topology.world_size)
    if training.global_batch_size % at_once == 0:
        return None
    below = training.global_batch_size // at_once * at_once
    fitting = " or ".join(str(size) for size in (below, below + at_once) if size)
    return (
        f"{training.global_batch_size} given with micro_batch_size {training.micro_batch_size} and "
        f"{topology.world_size} rank{'s' if topology.world_size != 1 else ''} ({fitting} would fit)"
    )


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Shares of the global batch: one for each rank of a pipeline stage, or for those that share rows."""
    return max(1, world_size // (config.parallel.pipeline_stages * config.parallel.sequence_parallel))


def _stages_and_ranks(topology: Topology) -> str | None:
    stages = topology.config.parallel.pipeline_stages
    wrong = topology.world_size % stages != 0
    return (
        f"{stages} given with {topology.world_size} rank{'s' * (topology.world_size > 1)}" if wrong else None
    )


def _sequence_and_ranks(topology: Topology) -> str | None:
    ranks = topology.config.parallel.sequence_parallel
    wrong = topology.world_size % ranks != 0
    return (
        f"{ranks} given with {topology.world_size} rank{'s' * (topology.world_size > 1)}" if wrong else None
    )


def _sequence_and_stages(topology: Topology) -> str | None:
    parallel = topology.config.parallel
    wrong = parallel.sequence_parallel > 1 and parallel.pipeline_stages > 1
    return (
        f"{parallel.sequence_parallel} given with pipeline_stages {parallel.pipeline_stages}"
        if wrong
        else None
    )


def _sequence_and_length(topology: Topology) -> str | None:
    ranks, length = topology.config.parallel.sequence_parallel, topology.config.data.max_length
    return f"{length} given with parallel.sequence_parallel {ranks}" if length % ranks else None


def _stages_and_zero(topology: Topology) -> str | None:
    parallel = topology.config.parallel
    wrong = parallel.pipeline_stages > 1 and parallel.zero_stage > 1
    return f"{parallel.zero_stage} given with pipeline_stages {parallel.pipeline_stages}" if wrong else None


def _tasks_on_parts(topology: Topology) -> str | None:
    every_steps, parallel = topology.config.evaluation.tasks_every_steps, topology.config.parallel
    if every_steps is None or (parallel.pipeline_stages == 1 and parallel.zero_stage < 3):
        return None
    return (
        f"{every_steps} given with pipeline_stages {parallel.pipeline_stages} and zero_stage "
        f"{parallel.zero_stage}"
    )


def _boundary_count(topology: Topology) -> str | None:
    parallel = topology.config.parallel
    wrong = (
        parallel.stage_boundaries is not None and len(parallel.stage_boundaries) != parallel.pipeline_stages
    )
    return (
        f"{len(parallel.stage_boundaries or ())} given for {parallel.pipeline_stages} stages"
        if wrong
        else None
    )


def _probed_in_parts(topology: Topology) -> str | None:
    parallel = topology.config.parallel
    wrong = topology.config.adapter.is_unprobed and (parallel.pipeline_stages > 1 or parallel.zero_stage == 3)
    return (
        f'"probe" given with pipeline_stages {parallel.pipeline_stages} and zero_stage {parallel.zero_stage}'
        if wrong
        else None
    )


def _state_dtype_in_pipeline(topology: Topology) -> str | None:
    config = topology.config
    wrong = (
        config.parallel.pipeline_stages > 1
        and config.model.compute_dtype != "auto"
        and config.adapter.state_dtype not in (None, config.model.compute_dtype)
    )
    return (
        f'"{config.adapter.state_dtype}" given with compute_dtype "{config.model.compute_dtype}"'
        if wrong
        else None
    )


def _compiled_in_parts(topology: Topology) -> str | None:
    parallel = topology.config.parallel
    wrong = topology.config.training.compile and (
        parallel.pipeline_stages > 1 or parallel.sequence_parallel > 1 or parallel.zero_stage == 3
    )
    return (
        f"true given with pipeline_stages {parallel.pipeline_stages}, sequence_parallel "
        f"{parallel.sequence_parallel} and zero_stage {parallel.zero_stage}"
        if wrong
        else None
    )


def _offloaded_optimizer(topology: Topology) -> str | None:
    parallel = topology.config.parallel
    wrong = parallel.offload_optimizer and parallel.zero_stage < 1
    return f"true given with zero_stage {parallel.zero_stage}" if wrong else None


def _offloaded_parameters(topology: Topology) -> str | None:
    parallel = topology.config.parallel
    wrong = parallel.offload_parameters and parallel.zero_stage != 3
    return f"true given with zero_stage {parallel.zero_stage}" if wrong else None


def _optimizer_on_cpu(topology: Topology) -> str | None:
    optimizer = topology.config.training.optimizer
    wrong = optimizer != "adamw" and topology.device_type not in (None, "cuda")
    return f'"{optimizer}" given on device type {topology.device_type}' if wrong else None


def _optimizer_offloaded(topology: Topology) -> str | None:
    optimizer = topology.config.training.optimizer
    wrong = optimizer != "adamw" and topology.config.parallel.offload_optimizer
    return f'"{optimizer}" given with offload_optimizer' if wrong else None


def _optimizer_sharded(topology: Topology) -> str | None:
    optimizer, stage = topology.config.training.optimizer, topology.config.parallel.zero_stage
    return f'"{optimizer}" given with zero_stage {stage}' if "8bit" in optimizer and stage > 0 else None


def _flash_on_cpu(topology: Topology) -> str | None:
    wrong = _wants_flash(topology) and topology.device_type not in (None, "cuda")
    return f'"flash_attention_2" given on device type {topology.device_type}' if wrong else None


def _flash_missing(topology: Topology) -> str | None:
    wrong = _wants_flash(topology) and topology.flash_attention_installed is False
    return '"flash_attention_2" given without the package' if wrong else None


def _flash_in_float32(topology: Topology) -> str | None:
    wrong = _wants_flash(topology) and topology.config.model.compute_dtype == "float32"
    return (
        f'"flash_attention_2" given with compute_dtype "{topology.config.model.compute_dtype}"'
        if wrong
        else None
    )


def _wants_flash(topology: Topology) -> bool:
    return topology.config.model.attention == "flash_attention_2"


RULES = (
    TopologyRule(
        fields=("training.global_batch_size", "training.micro_batch_size"),
        condition="a multiple of training.micro_batch_size x ranks / "
        "(parallel.pipeline_stages x parallel.sequence_parallel)",
        reason="every rank runs the same number of micro-batches in a step",
        remedy="change either batch size or the number of ranks",
        broken=_batch,
    ),
    TopologyRule(
        fields=("parallel.pipeline_stages",),
        condition="a divisor of the number of ranks",
        reason="every stage has as many data-parallel ranks as the others",
        remedy="change parallel.pipeline_stages or the number of ranks",
        broken=_stages_and_ranks,
    ),
    TopologyRule(
        fields=("parallel.sequence_parallel",),
        condition="a divisor of the number of ranks",
        reason="as many ranks share every row",
        remedy="change parallel.sequence_parallel or the number of ranks",
        broken=_sequence_and_ranks,
    ),
    TopologyRule(
        fields=("parallel.sequence_parallel", "parallel.pipeline_stages"),
        condition="1 with parallel.pipeline_stages above 1",
        reason="stages exchange whole rows",
        remedy="set one of them to 1",
        broken=_sequence_and_stages,
    ),
    TopologyRule(
        fields=("data.max_length", "parallel.sequence_parallel"),
        condition="a multiple of parallel.sequence_parallel",
        reason="rows are padded until each rank has as many tokens",
        remedy="change data.max_length",
        broken=_sequence_and_length,
    ),
    TopologyRule(
        fields=("parallel.zero_stage", "parallel.pipeline_stages"),
        condition="0 or 1 with parallel.pipeline_stages above 1",
        reason="DeepSpeed's pipeline engine keeps gradients and parameters of a stage whole",
        remedy="set parallel.zero_stage to 0 or 1, or parallel.pipeline_stages to 1",
        broken=_stages_and_zero,
    ),
    TopologyRule(
        fields=("parallel.stage_boundaries", "parallel.pipeline_stages"),
        condition="one first layer for each of parallel.pipeline_stages",
        reason="every layer belongs to one stage",
        remedy="list the first layer of every stage, or set it to null",
        broken=_boundary_count,
    ),
    TopologyRule(
        fields=("evaluation.tasks_every_steps", "parallel.pipeline_stages", "parallel.zero_stage"),
        condition="null with parallel.pipeline_stages above 1 or parallel.zero_stage 3",
        reason="tasks are answered by a whole model on every rank, each with items of its own",
        remedy="set it to null and evaluate a checkpoint with launch/evaluate.py",
        broken=_tasks_on_parts,
    ),
    TopologyRule(
        fields=("adapter.placement", "adapter.places", "parallel.pipeline_stages", "parallel.zero_stage"),
        condition='"probe" without adapter.places only with parallel.pipeline_stages 1 and '
        "parallel.zero_stage below 3",
        reason="a probe takes gradients of the whole backbone on every rank, before anything is split",
        remedy="set parallel.pipeline_stages to 1, parallel.zero_stage to 2 or less and "
        "parallel.offload_parameters, which needs ZeRO 3, to false; or name adapter.places, as a run with "
        "these settings writes them to its config.json before its first step",
        broken=_probed_in_parts,
    ),
    TopologyRule(
        fields=("adapter.state_dtype", "parallel.pipeline_stages", "model.compute_dtype"),
        condition="null or model.compute_dtype with parallel.pipeline_stages above 1",
        reason="hidden states and state cross a stage boundary in one tensor",
        remedy="set adapter.state_dtype to null or parallel.pipeline_stages to 1",
        broken=_state_dtype_in_pipeline,
    ),
    TopologyRule(
        fields=(
            "training.compile",
            "parallel.pipeline_stages",
            "parallel.sequence_parallel",
            "parallel.zero_stage",
        ),
        condition="true only with parallel.pipeline_stages 1, parallel.sequence_parallel 1 and "
        "parallel.zero_stage below 3",
        reason="a decoder layer is compiled whole, and these gather or exchange tensors within, or recompute "
        "it in parts",
        remedy="set training.compile to false, or the others to 1 and at most 2",
        broken=_compiled_in_parts,
    ),
    TopologyRule(
        fields=("parallel.offload_optimizer", "parallel.zero_stage"),
        condition="true only with parallel.zero_stage 1, 2 or 3",
        reason="offloading is part of ZeRO",
        remedy="set parallel.zero_stage to 1 or higher, or parallel.offload_optimizer to false",
        broken=_offloaded_optimizer,
    ),
    TopologyRule(
        fields=("parallel.offload_parameters", "parallel.zero_stage"),
        condition="true only with parallel.zero_stage 3",
        reason="only ZeRO 3 shards parameters, and what is not sharded stays on the device",
        remedy="set parallel.zero_stage to 3 or parallel.offload_parameters to false",
        broken=_offloaded_parameters,
    ),
    TopologyRule(
        fields=("training.optimizer",),
        condition='other than "adamw" only on CUDA',
        reason="bitsandbytes' 8-bit and paged optimisers save device memory, of which a CPU has none",
        remedy='set training.optimizer to "adamw" or run on CUDA devices',
        broken=_optimizer_on_cpu,
    ),
    TopologyRule(
        fields=("training.optimizer", "parallel.offload_optimizer"),
        condition='other than "adamw" only without parallel.offload_optimizer',
        reason="an offloaded optimiser steps in host memory, where 8-bit and paged moments save nothing",
        remedy='set training.optimizer to "adamw" or parallel.offload_optimizer to false',
        broken=_optimizer_offloaded,
    ),
    TopologyRule(
        fields=("training.optimizer", "parallel.zero_stage"),
        condition="in 8 bits only with parallel.zero_stage 0",
        reason="8-bit moments come in blocks that shards would cut, so that no checkpoint could be of them",
        remedy='set training.optimizer to "adamw" or "paged_adamw", or parallel.zero_stage to 0',
        broken=_optimizer_sharded,
    ),
    TopologyRule(
        fields=("model.attention",),
        condition='"flash_attention_2" only on CUDA',
        reason="its kernels exist for CUDA alone",
        remedy='set model.attention to "auto" or run on CUDA devices',
        broken=_flash_on_cpu,
    ),
    TopologyRule(
        fields=("model.attention",),
        condition='"flash_attention_2" only with the package flash_attn',
        reason="it is not among the packages installed by default",
        remedy='set model.attention to "auto" or install flash-attn',
        broken=_flash_missing,
    ),
    TopologyRule(
        fields=("model.attention", "model.compute_dtype"),
        condition='"flash_attention_2" only with model.compute_dtype "bfloat16" or "float16"',
        reason="its kernels compute in 16 bits",
        remedy='set model.attention to "auto" or model.compute_dtype to "bfloat16"',
        broken=_flash_in_float32,
    ),
)


def topology_problems(
    config: RunConfig,
    *,
    world_size: int,
    device_type: str | None = None,
    flash_attention_installed: bool | None = None,
    doubtful: Doubtful = NONE_DOUBTFUL,
    for_training: bool = True,
) -> list[str]:
    """One line per rule of `RULES` that is broken.

    Args:
        config: the configuration.
        world_size: number of ranks.
        device_type: `cuda` or `cpu`; None leaves the rules about it unjudged.
        flash_attention_installed: whether `flash_attn` is; None leaves the rule about it unjudged.
        doubtful: fields that hold a stand-in; rules that read one of them are left out.
        for_training: false leaves out all rules but those about the model alone.
    """
    topology = Topology(config, world_size, device_type, flash_attention_installed)
    lines = []
    for rule in RULES:
        if not for_training and not all(field.startswith("model.") for field in rule.fields):
            continue
        given = rule.broken(topology) if doubtful.clear_of(*rule.fields) else None
        if given is not None:
            lines.append(
                f"{rule.fields[0]}: {given}; allowed: {rule.condition}: {rule.reason}; {rule.remedy}"
            )
    return lines


def gradient_accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per rank in one optimiser step.

    Raises:
        ConfigError: the global batch cannot be divided so.
    """
    given = _batch(Topology(config, world_size))
    if given is not None:
        rule = RULES[0]
        raise ConfigError([f"{rule.fields[0]}: {given}; allowed: {rule.condition}; {rule.remedy}"])
    ranks = data_parallel_size(config, world_size)
    return config.training.global_batch_size // (config.training.micro_batch_size * ranks)


def markdown_table() -> str:
    """The rules as a Markdown table."""
    rows = ["| setting | allowed | because | remedy |", "| --- | --- | --- | --- |"]
    rows += [f"| `{rule.fields[0]}` | {rule.condition} | {rule.reason} | {rule.remedy} |" for rule in RULES]
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown_table())
