"""The DeepSpeed configuration of a run, as a pure function of what the other sections decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# DeepSpeed's own, for models that are trained whole: 2 GB in float32.
MAX_BUCKET_SIZE = 500_000_000


def deepspeed_config(
    *,
    zero_stage: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    max_grad_norm: float | None,
    num_trained: int,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    native: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's dictionary for a frozen backbone with float32 adapters.

    Neither `bf16` nor `fp16` is set: DeepSpeed would cast the adapters, which stay in float32 as their own
    master weights, while the frozen backbone keeps the dtype it was loaded in. At ZeRO 0 clipping is ours
    (`engine.clip_gradients`), at ZeRO 1 to 3 DeepSpeed's.

    Args:
        zero_stage: 0 to 3.
        micro_batch_size: sequences per rank and micro-batch.
        gradient_accumulation_steps: micro-batches per step and rank.
        max_grad_norm: global norm to clip to; None leaves gradients as they are.
        num_trained: values of what is trained, whose gradients ZeRO reduces in one buffer on the device.
        offload_optimizer: optimiser state in host memory (ZeRO >= 1).
        offload_parameters: parameters in host memory (ZeRO 3).
        native: DeepSpeed keys from the configuration's `deepspeed` section, merged in last.
    """
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": min(num_trained, MAX_BUCKET_SIZE),
    }
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    base = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": (max_grad_norm or 0.0) if zero_stage > 0 else 0.0,
        "zero_optimization": zero,
        # bitsandbytes' optimisers are not on DeepSpeed's list, and megabytes of adapters need no C++ Adam.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        # It would wait for the device twice a micro-batch, for numbers that nobody is shown.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merged(base, native or {})


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
