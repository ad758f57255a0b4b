"""The floating-point type that a machine computes in: decided here for models, runs, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Set
from pathlib import Path
from typing import Literal

DTypeName = Literal["bfloat16", "float16", "float32"]

# The first CUDA devices that multiply bfloat16: Ampere.
BFLOAT16_CAPABILITY = (8, 0)
# Instructions that multiply bfloat16, as Linux names them; without them products are an eighth as fast as in
# float32.
BFLOAT16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
CPUINFO = Path("/proc/cpuinfo")
# Every device computes in those behind what it multiplies itself.
_WIDENING: tuple[DTypeName, ...] = ("bfloat16", "float16", "float32")


def suitable_dtype(
    device_type: str, *, capability: tuple[int, int] | None = None, cpu_flags: Set[str] = frozenset()
) -> DTypeName:
    """What a device of these properties computes in.

    Args:
        device_type: `cuda` or `cpu`.
        capability: compute capability of a CUDA device.
        cpu_flags: instruction sets of a CPU, as Linux names them.

    Returns:
        bfloat16 where the device multiplies it natively; otherwise float16 on CUDA, float32 on a CPU.
    """
    if device_type == "cuda":
        assert capability is not None
        return "bfloat16" if capability >= BFLOAT16_CAPABILITY else "float16"
    return "bfloat16" if cpu_flags & BFLOAT16_CPU_FLAGS else "float32"


def machine_dtype(device_type: str) -> DTypeName:
    """What this machine computes in on its CPU, or on each of the CUDA devices that are visible."""
    if device_type != "cuda":
        return suitable_dtype(device_type, cpu_flags=cpu_flags())
    import torch

    count = torch.cuda.device_count()
    return common_dtype(
        suitable_dtype("cuda", capability=torch.cuda.get_device_capability(index)) for index in range(count)
    )


def common_dtype(names: Iterable[DTypeName]) -> DTypeName:
    """What machines compute in together of which each would take one of `names` alone."""
    # Where there is none, as on a machine that plans for others, nothing is ruled out.
    return max(names, key=_WIDENING.index, default="bfloat16")


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Instruction sets of this machine's CPU; none where Linux does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))
