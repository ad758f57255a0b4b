"""Peaks of devices, and peak memory by rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.training.metrics import memory_gib, peak_memory_gib, peak_tflops


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


class ThreeRanks(DistributedContext):
    """Rank 1 of three, where the others add nothing."""

    def sum(self, values: Any) -> list[float]:
        return list(values)


def test_memory_is_listed_by_rank() -> None:
    ranks = ThreeRanks(1, 3, 1, torch.device("cpu"))
    first, peak, last = peak_memory_gib(ranks)
    assert (first, last) == (0.0, 0.0)
    # This process holds torch: some hundred MiB at the least.
    assert 0.1 < peak < 64
    first, before, last = memory_gib(ranks)
    assert (first, last) == (0.0, 0.0)
    held = torch.ones(2**26)
    assert 0.2 < memory_gib(ranks)[1] - before < 0.3, f"a quarter of a GiB more, {held.nbytes} bytes"
