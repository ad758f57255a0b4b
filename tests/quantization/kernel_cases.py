"""The Triton kernel against bitsandbytes' dequantisation: run by `test_dequantization_kernel.py`.

With `TRITON_INTERPRET=1` on the CPU, else on a GPU. Triton reads it when kernels are made, so this is a
process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmlora_dist.quantization import operators, quantize_linear, triton_dequantization
from ssmlora_dist.quantization.linear import Linear4bit

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# The last: rows that end within a block, and a last block that is not whole.
SHAPES = [(64, 128), (3, 64), (300, 320), (515, 576), (9, 96)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(shape: tuple[int, int], mode: Any, dtype: torch.dtype, storage: torch.dtype | None) -> Linear4bit:
    print("seed 5")
    linear = nn.Linear(shape[1], shape[0], bias=False)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    linear.weight.data = weight * torch.linspace(0.01, 3, shape[0]).unsqueeze(1)
    layer = quantize_linear(linear, mode=mode, compute_dtype=dtype, quant_storage=storage).to(DEVICE)
    assert isinstance(layer, Linear4bit)
    return layer


def by(module: Any, layer: Linear4bit, num_rows: int | None = None) -> Tensor:
    state = layer.quant_state
    nested = state.state2
    weight: Tensor = module.dequantize_4bit(
        nested.absmax,
        nested.code,
        state.offset,
        state.absmax,
        state.code,
        layer.weight.detach(),
        state.quant_type,
        num_rows or layer.out_features,
        state.dtype,
    )
    return weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_for_bit(shape: tuple[int, int], mode: str, dtype: torch.dtype) -> None:
    layer = drawn(shape, mode, dtype, torch.uint8)
    got = by(triton_dequantization, layer)
    assert got.shape == shape
    # bitsandbytes mixes up scales on a CPU where a row ends within a block.
    wanted = by(operators, layer, None if shape[1] % 64 == 0 else 1).view(shape)
    assert got.dtype == wanted.dtype == dtype
    if IS_INTERPRETED and dtype == torch.bfloat16:
        # The interpreter rounds to bfloat16 towards zero, as no GPU does.
        assert ((got.view(torch.int16) - wanted.view(torch.int16)).abs() <= 1).all()
    else:
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_any_storage(storage: torch.dtype) -> None:
    layer = drawn((12, 64), "nf4", torch.float32, storage)
    assert layer.weight.dtype == storage
    assert torch.equal(by(triton_dequantization, layer), layer.dequantize(layer.weight.detach()))


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU")
def test_a_layer_on_a_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, taken = drawn((12, 64), "nf4", torch.bfloat16, None), []
    kernel = triton_dequantization.dequantize_4bit
    monkeypatch.setattr(
        triton_dequantization, "dequantize_4bit", lambda *given: taken.append(0) or kernel(*given)
    )
    assert torch.equal(layer.dequantize(layer.weight.detach()), by(operators, layer))
    assert taken
