"""Dequantisation in one launch: its bits, interpreted or on a GPU, and that layers on CUDA take it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmlora_dist.fake_cuda.pretend import pretended_cuda
from ssmlora_dist.fake_cuda.watch import Watch
from ssmlora_dist.quantization import quantize_linear
from tests.fake_cuda.cases import needs_compiler

CASES = Path(__file__).with_name("kernel_cases.py")
TIMEOUT_SECONDS = 300


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
def test_the_kernel_has_bitsandbytes_bits(interpreted: bool) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_compiler
@pytest.mark.parametrize("double_quantization", [True, False])
def test_a_layer_on_cuda_dequantises_in_one_launch(double_quantization: bool) -> None:
    with pretended_cuda(), FakeTensorMode(), Watch("cuda") as watch:
        linear = nn.Linear(96, 64, bias=False, device="cuda")
        layer = quantize_linear(linear, mode="nf4", double_quantization=double_quantization)
        watch.reset()
        weight = layer.dequantize(layer.weight.detach())
    assert weight.shape == (64, 96)
    assert weight.dtype == torch.bfloat16
    assert [name for _, name in watch.launches] == ["dequantize_4bit"]
    assert sum(watch.launches.values()) == 1


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_stays_in_registers(capability: int, tmp_path: Path) -> None:
    """Compiled ahead of time: ptxas comes with Triton."""
    triton = pytest.importorskip("triton")
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssmlora_dist.quantization import triton_dequantization as kernels

    kernel = kernels._dequantize_kernel
    constants = {"BLOCK": kernels.BLOCK_SIZE, "NESTED": kernels.NESTED_BLOCK_SIZE, "BLOCKS": kernels.BLOCKS}
    kinds = {"scales_ptr": "*u8", "packed_ptr": "*u8", "weight_ptr": "*bf16", "num_bytes": "i32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=places,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "STACK:0" in shown, shown
    # A product and a sum are two roundings, as bitsandbytes has them.
    assert "fma" not in compiled.asm["ptx"]
    print(shown)
