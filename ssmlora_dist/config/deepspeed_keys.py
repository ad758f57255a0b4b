"""Which native keys the `deepspeed` section may hold: those that no other section decides.

DeepSpeed ignores top-level keys that it does not know, so a misspelt one would change nothing in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ssmlora_dist.config.problems import nearest
from ssmlora_dist.config.shown import shown

DECIDED_BY = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size and training.micro_batch_size",
    "managed_gradient_accumulation": "training.global_batch_size and training.micro_batch_size",
    "optimizer": "training.optimizer, training.learning_rate, training.betas and training.weight_decay",
    "zero_allow_untested_optimizer": "training.optimizer",
    "zero_force_ds_cpu_optimizer": "training.optimizer and parallel.offload_optimizer",
    "scheduler": "training.schedule and training.warmup_steps",
    "gradient_clipping": "training.max_grad_norm",
    "bf16": "model.compute_dtype",
    "bfloat16": "model.compute_dtype",
    "fp16": "model.compute_dtype",
    "amp": "model.compute_dtype",
    "torch_autocast": "model.compute_dtype",
    "activation_checkpointing": "training.gradient_checkpointing",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.offload_param": "parallel.offload_parameters",
    "zero_optimization.cpu_offload_params": "parallel.offload_parameters",
}
"""DeepSpeed's key to the fields that decide it."""

PASSED_ON = (
    "zero_optimization",
    "aio",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
)
"""Top-level keys of DeepSpeed 0.19 that a run hands to it unchanged."""


def deepspeed_problems(section: Mapping[str, Any]) -> Iterator[str]:
    """A line for every key of the `deepspeed` section that cannot stand there."""
    for key, value in section.items():
        if key in DECIDED_BY:
            yield _decided(key, value)
        elif key not in PASSED_ON:
            near = nearest(key, [*PASSED_ON, *DECIDED_BY])
            if near in DECIDED_BY:
                guess = f"if {near} was meant, set {DECIDED_BY[near]} instead"
            elif near:
                guess = f'did you mean "{near}"?'
            else:
                guess = f"allowed: {', '.join(PASSED_ON)}; remove it"
            yield f"deepspeed.{key}: no DeepSpeed key that a run passes on ({shown(value)} given); {guess}"
    zero = section.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f"deepspeed.zero_optimization: {shown(zero)} given; allowed: an object; write its keys in {{ }}"
        return
    for key, value in zero.items():
        if f"zero_optimization.{key}" in DECIDED_BY:
            yield _decided(f"zero_optimization.{key}", value)


def _decided(key: str, value: Any) -> str:
    return (
        f"deepspeed.{key}: {shown(value)} given; allowed: only keys that no other section decides; "
        f"remove it and set {DECIDED_BY[key]}"
    )
