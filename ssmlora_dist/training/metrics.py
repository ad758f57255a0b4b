"""Peaks of devices, and memory as measured; each name carries its unit."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.ranks import read_launch_environment

GIB = 2**30
# Pages that this process has, the second number those in memory.
STATM = Path("/proc/self/statm")
# Dense bf16 tensor-core peaks by device name, TFLOP/s, from the makers' data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}

# Of the memory that is free before loading: the rest is for allocators and libraries.
MEMORY_SHARE = 0.85


def peak_tflops(device: torch.device) -> float | None:
    """Peak of the device in bf16, TFLOP/s; None where it is not known (CPU, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def usable_memory_bytes(device: torch.device) -> float:
    """What may be planned with: most of what is free on a GPU, or of a rank's share of its host's memory."""
    if device.type == "cuda":
        return MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return MEMORY_SHARE * host / read_launch_environment().local_world_size


def peak_memory_gib(context: DistributedContext) -> list[float]:
    """Largest memory use so far, by rank: allocated on the GPU, or resident in the host on a CPU."""
    if context.device.type == "cuda":
        return _by_rank(torch.cuda.max_memory_allocated(context.device), context)
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return _by_rank(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, context)


def memory_gib(context: DistributedContext) -> list[float]:
    """Memory in use, by rank; as `peak_memory_gib`, which stands for it where there is no /proc."""
    if context.device.type == "cuda":
        return _by_rank(torch.cuda.memory_allocated(context.device), context)
    if not STATM.exists():
        return peak_memory_gib(context)
    return _by_rank(_resident_bytes(), context)


def memory_text(device: torch.device) -> str:
    """What of a rank's memory is in use and what is free, in words; on a CPU of the host's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        numbers = (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device), free, total)
        allocated, reserved, free_gib, total_gib = (f"{number / GIB:.2f}" for number in numbers)
        return (
            f"{allocated} GiB allocated, {reserved} GiB reserved by torch, "
            f"{free_gib} GiB free of {total_gib} GiB"
        )
    resident = f"{_resident_bytes() / GIB:.2f} GiB resident" if STATM.exists() else "memory of the host"
    return f"{resident} in this process"


def _resident_bytes() -> int:
    return int(STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _by_rank(num_bytes: int, context: DistributedContext) -> list[float]:
    mine = [0.0] * context.world_size
    mine[context.rank] = num_bytes / GIB
    return context.sum(mine)
