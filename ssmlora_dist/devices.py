"""Where this machine computes: on its GPUs, or on its CPU where it has none or was asked to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ssmlora_dist.errors import ConfigError

ASK_FOR_CPU = 'CUDA_VISIBLE_DEVICES=""'
# What torch says where there is nothing that could be used.
_NOTHING_THERE = ("Found no NVIDIA driver", "No CUDA GPUs are available")
# The one that torch reads for every device, and those it reads for one kind.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_NVIDIA, _DISPLAY = "0x10de", "0x03"
PCI_DEVICES = Path("/sys/bus/pci/devices")


def _prepare_allocator() -> None:
    """Has torch's CUDA allocator grow its segments; what the user has set stays.

    Rows differ in length from step to step: segments of which no part is large enough any more would add up.
    torch reads it as it first allocates.
    """
    if not any(variable in os.environ for variable in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def device_type() -> Literal["cuda", "cpu"]:
    """What this process computes on; to be asked before it computes anything there.

    CUDA_VISIBLE_DEVICES without a device asks for the CPU.

    Raises:
        ConfigError: nobody has asked for the CPU, torch is built for CUDA and finds a GPU or a driver that it
            cannot use.
    """
    import torch

    _prepare_allocator()
    if torch.cuda.is_available():
        return "cuda"
    if torch.version.cuda is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "cpu"
    try:
        torch.cuda.init()
        reason = "it gives no reason"
    except (RuntimeError, AssertionError) as error:
        reason = str(error)
    if reason.startswith(_NOTHING_THERE) and not _has_nvidia_gpu():
        return "cpu"
    problem = (
        f"torch {torch.__version__} cannot use this machine's GPU: {' '.join(reason.split())}; mend the "
        f"driver, give the container its GPUs, or set {ASK_FOR_CPU} to compute on the CPU"
    )
    raise ConfigError([problem], source="environment")


def _has_nvidia_gpu() -> bool:
    """Whether Linux sees one, driver or not."""
    return any(
        _read(device / "vendor") == _NVIDIA and _read(device / "class").startswith(_DISPLAY)
        for device in PCI_DEVICES.glob("*")
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""
