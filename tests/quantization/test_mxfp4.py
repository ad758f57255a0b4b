"""MXFP4 weights are those that transformers reads."""

from __future__ import annotations

import pytest
import torch

from ssmlora_dist.quantization import dequantize_mxfp4, dequantized_weight, quantize_experts
from tests.quantization.test_experts import tiny_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def packed(num_experts: int, outputs: int, groups: int, seed: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (num_experts, outputs, groups, 16), generator=generator)
    scales = torch.randint(110, 130, (num_experts, outputs, groups), generator=generator)
    return blocks.byte(), scales.byte()


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = packed(3, 10, 4)
    found = dequantize_mxfp4(blocks, scales, dtype=dtype)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert found.shape == (3, 128, 10)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_exponent_is_read(dtype: torch.dtype) -> None:
    blocks = torch.full((1, 256, 1, 16), 0x2A, dtype=torch.uint8)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1)
    found = dequantize_mxfp4(blocks, scales, dtype=dtype)[0]
    # Codes 10 and 2: minus one, and one. Small ones are subnormal; of the largest exponent they are infinite.
    powers = torch.tensor([2.0**exponent if exponent < 128 else torch.inf for exponent in range(-127, 129)])
    assert torch.equal(found[0], -powers.to(dtype))
    assert torch.equal(found[1], powers.to(dtype))


def test_they_can_be_stored_as_nf4() -> None:
    experts = tiny_experts("gpt_oss", hidden_size=32, intermediate_size=64)
    tensors = dict(experts.named_parameters())
    tensors["gate_up_proj"] = dequantize_mxfp4(*packed(6, 128, 1), dtype=torch.bfloat16)
    tensors["down_proj"] = dequantize_mxfp4(*packed(6, 32, 2), dtype=torch.bfloat16)
    quantized = quantize_experts(experts, lambda name, _: tensors[name].detach(), mode="nf4")
    for name in ("gate_up_proj", "down_proj"):
        experts.get_parameter(name).data = tensors[name]
        expected = quantize_experts(experts, mode="nf4")
        assert torch.equal(dequantized_weight(quantized, name), dequantized_weight(expected, name))
