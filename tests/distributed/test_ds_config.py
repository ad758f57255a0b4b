"""DeepSpeed's dictionary from what the other sections decide."""

from __future__ import annotations

from typing import Any

import pytest

from ssmlora_dist.distributed.ds_config import deepspeed_config

BASE: dict[str, Any] = {
    "zero_stage": 0,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_grad_norm": 1.0,
    "num_trained": 15_798_272,
}

# Settings beside `BASE`, a dotted path in the result, and what is there; None: the key is not there.
TABLE: list[tuple[dict[str, Any], str, Any]] = [
    ({}, "train_micro_batch_size_per_gpu", 2),
    ({}, "gradient_accumulation_steps", 4),
    ({}, "zero_optimization.stage", 0),
    ({"zero_stage": 3}, "zero_optimization.stage", 3),
    # At ZeRO 0 the norm is summed in the order of names, by `clip_gradients`.
    ({}, "gradient_clipping", 0.0),
    ({"zero_stage": 1}, "gradient_clipping", 1.0),
    ({"zero_stage": 2, "max_grad_norm": 0.5}, "gradient_clipping", 0.5),
    ({"zero_stage": 3, "max_grad_norm": None}, "gradient_clipping", 0.0),
    ({"zero_stage": 1}, "zero_optimization.offload_optimizer", None),
    ({"zero_stage": 1, "offload_optimizer": True}, "zero_optimization.offload_optimizer.device", "cpu"),
    ({"zero_stage": 1, "offload_optimizer": True}, "zero_optimization.offload_param", None),
    ({"zero_stage": 3, "offload_parameters": True}, "zero_optimization.offload_param.device", "cpu"),
    ({"zero_stage": 3, "offload_parameters": True}, "zero_optimization.offload_optimizer", None),
    # The adapters are float32 and their own master weights; DeepSpeed must neither cast nor replace anything.
    ({"zero_stage": 3}, "bf16", None),
    ({"zero_stage": 3}, "fp16", None),
    ({"zero_stage": 3}, "optimizer", None),
    ({"zero_stage": 1, "offload_optimizer": True}, "zero_force_ds_cpu_optimizer", False),
    ({"zero_stage": 1}, "zero_allow_untested_optimizer", True),
    # 60 MiB and not 2 GB of the device, of whatever is trained.
    ({"zero_stage": 1}, "zero_optimization.reduce_bucket_size", 15_798_272),
    ({"zero_stage": 3}, "zero_optimization.reduce_bucket_size", 15_798_272),
    ({"zero_stage": 2, "num_trained": 8 * 10**9}, "zero_optimization.reduce_bucket_size", 5 * 10**8),
    (
        {"zero_stage": 2, "native": {"zero_optimization": {"reduce_bucket_size": 7}}},
        "zero_optimization.reduce_bucket_size",
        7,
    ),
    # It has the host wait for the device around every micro-batch.
    ({}, "timers.throughput.enabled", False),
    ({"native": {"wall_clock_breakdown": True}}, "wall_clock_breakdown", True),
    ({"native": {"steps_per_print": 5}}, "steps_per_print", 5),
    ({"native": {"zero_optimization": {"overlap_comm": True}}}, "zero_optimization.overlap_comm", True),
    # Native keys of a section are added to it: they do not replace it.
    (
        {"zero_stage": 2, "native": {"zero_optimization": {"overlap_comm": True}}},
        "zero_optimization.stage",
        2,
    ),
]


@pytest.mark.parametrize(("settings", "path", "expected"), TABLE)
def test_keys(settings: dict[str, Any], path: str, expected: Any) -> None:
    found: Any = deepspeed_config(**{**BASE, **settings})
    for key in path.split("."):
        found = found.get(key)
    assert found == expected


def test_native_keys_stay_as_they_were() -> None:
    native = {"zero_optimization": {"overlap_comm": True}}
    deepspeed_config(**BASE, native=native)
    assert native == {"zero_optimization": {"overlap_comm": True}}
