"""MXFP4, the form in which gpt-oss' experts are published: read, to be stored as the others are.

Shapes: E experts, O outputs, G groups of 32 inputs, D = 32 G inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the 4-bit codes: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127


def dequantize_mxfp4(blocks_EOGB: Tensor, scales_EOG: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Weights [E,D,O] in `dtype`, as gpt-oss' experts have them, from packed ones.

        w[e,32g+2b,o] = value(blocks[e,o,g,b] & 15) 2^(scales[e,o,g] - 127); the upper 4 bits are the next

    One expert at a time, so that no temporary is larger than a few times its weights.

    Args:
        blocks_EOGB: two codes in each byte, the lower 4 bits first, [E,O,G,16] uint8.
        scales_EOG: exponents of two of each group, [E,O,G] uint8.
        dtype: of the result; a value beyond its range becomes infinite.
    """
    num_experts, num_outputs, num_groups, num_bytes = blocks_EOGB.shape
    assert blocks_EOGB.dtype == scales_EOG.dtype == torch.uint8
    assert scales_EOG.shape == blocks_EOGB.shape[:-1]
    values = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], device=blocks_EOGB.device)
    num_inputs = num_groups * num_bytes * 2
    weights = torch.empty(num_experts, num_inputs, num_outputs, dtype=dtype, device=blocks_EOGB.device)
    for expert, (blocks_OGB, scales_OG) in enumerate(zip(blocks_EOGB, scales_EOG, strict=True)):
        codes = torch.stack([blocks_OGB & 15, blocks_OGB >> 4], dim=-1).flatten(2)
        scaled = torch.ldexp(values[codes.int()], scales_OG.int().unsqueeze(-1) - _EXPONENT_BIAS)
        weights[expert] = scaled.view(num_outputs, num_inputs).T
    return weights
