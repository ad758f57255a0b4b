"""The Triton kernels against the plain operators, interpreted or on a GPU; and compiled without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

CASES = Path(__file__).with_name("kernel_cases.py")
TIMEOUT_SECONDS = 300
CAPABILITIES = (80, 90, 100)
# The usual one, one that a wider block of tokens would spill, and the largest for which there are kernels.
RANKS = (8, 32, 128)
# Two registers: ptxas spills one rather than take so many that fewer blocks run at a time.
MOST_SPILLED_BYTES = 8

triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    "interpreted",
    [
        True,
        pytest.param(
            False,
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        ),
    ],
    ids=["interpreted", "compiled"],
)
def test_kernels_compute_what_the_plain_operators_do(interpreted: bool) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(
    name: str, rank: int, dtype: str, absent: tuple[str, ...], capability: int = 90, **switches: Any
) -> Any:
    """A kernel for a GPU of a compute capability; tensors begin where torch's allocator puts them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmlora_dist.ops import triton_dropout
    from ssmlora_dist.ops.ssmlora import triton_kernels

    kernel = getattr(triton_dropout if "dropout" in name else triton_kernels, name)
    sizes = triton_kernels._sizes(rank)
    constants = {**sizes, **switches, **dict.fromkeys(absent)}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = {"seeds_ptr": "*i32", "keep_scale": "fp32", "scaling": "fp32"}
    kinds |= dict.fromkeys(("c_ptr", "d_ptr", "sums_ptr"), "*fp32") | dict.fromkeys(constants, "constexpr")
    signature = {
        name: kinds.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any, directory: Path) -> dict[str, int]:
    """What the code of a kernel takes: REG registers of a thread, and STACK bytes where they spill."""
    from triton import knobs

    binary = directory / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rank", RANKS)
def test_kernels_stay_in_registers(
    rank: int, capability: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    switches = {"NORMALIZATION": 0, "RAW": False, "DROPOUT": True, "CARRIED": True, "NEEDS_D_G": True}
    for name in ("_forward_kernel", "_backward_kernel"):
        found = resources(compiled(name, rank, "bf16", (), capability, **switches), tmp_path)
        print(f"sm_{capability}, rank {rank}, {name}: {found}")
        record_property(f"registers of {name}", found["REG"])
        assert found["STACK"] + found["LOCAL"] <= MOST_SPILLED_BYTES, "registers are spilled"


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile_for_a_gpu(dtype: str) -> None:
    switches = {"NORMALIZATION": 0, "RAW": False, "DROPOUT": True, "CARRIED": True, "NEEDS_D_G": True}
    for name in ("_forward_kernel", "_backward_kernel"):
        assert "cubin" in compiled(name, 8, dtype, (), **switches).asm
    switches |= {"NORMALIZATION": 1, "RAW": True, "DROPOUT": False, "CARRIED": False, "NEEDS_D_G": False}
    compiled("_backward_kernel", 8, dtype, ("seeds_ptr", "d_carried_ptr"), **switches)
    compiled("_dropout_kernel", 8, dtype, (), C=4096, BLOCK=1024)
