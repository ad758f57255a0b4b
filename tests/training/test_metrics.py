"""FLOPs by hand, and peak memory by rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ssmlora_dist.distributed.process_group import ProcessGroup
from ssmlora_dist.training.metrics import ModelShape, peak_memory_gib, peak_tflops

LLAMA_2_7B = SimpleNamespace(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
LLAMA_2_70B = SimpleNamespace(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
# Heads that together are wider than the hidden size.
QWEN3_0_6B = SimpleNamespace(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 4 x 4096^2 + 3 x 4096 x 11008 in each of 32 layers.
        (LLAMA_2_7B, 32 * (67_108_864 + 135_266_304)),
        # q and o 8192^2, k and v 8192 x 1024, 3 x 8192 x 28672 in each of 80 layers.
        (LLAMA_2_70B, 80 * (134_217_728 + 16_777_216 + 704_643_072)),
        # q and o 1024 x 2048, k and v 1024 x 1024, 3 x 1024 x 3072 in each of 28 layers.
        (QWEN3_0_6B, 28 * (4_194_304 + 2_097_152 + 9_437_184)),
    ],
)
def test_weights_that_multiply_each_token(config: Any, expected: int) -> None:
    assert ModelShape.of(config).matmul_parameters == expected


def test_flops_of_llama_2_7b() -> None:
    """4 N, and in each layer 2 products of half of 4,096 x 4,096 scores forward and twice that backward."""
    shape = ModelShape.of(LLAMA_2_7B)
    assert shape.flops_per_token(0) == 4 * 6_476_005_376
    attention_forward = 32 * 2 * 2 * (4096 / 2) * 4096
    assert shape.flops_per_token(4096) == 4 * 6_476_005_376 + 3 * attention_forward


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA A100-SXM4-40GB", 312.0), ("NVIDIA GeForce GTX 1080", None)],
)
def test_peaks_are_found_by_the_name_of_the_device(
    name: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda", 0)) == expected


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_tflops(torch.device("cpu")) is None


class ThreeRanks(ProcessGroup):
    """Rank 1 of three, where the others add nothing."""

    def sum(self, values: Any) -> list[float]:
        return list(values)


def test_memory_is_listed_by_rank() -> None:
    first, mine, last = peak_memory_gib(ThreeRanks(1, 3, 1, torch.device("cpu")))
    assert (first, last) == (0.0, 0.0)
    # This process holds torch: some hundred MiB at the least.
    assert 0.1 < mine < 64
