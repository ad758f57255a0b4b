"""Frozen linear layers and experts in 4 and 8 bits; the only importer of bitsandbytes."""

from ssmlora_dist.quantization.experts import QuantizedExperts, expert_weights, quantize_experts
from ssmlora_dist.quantization.inspection import dequantized_weight, is_quantized, stored_as
from ssmlora_dist.quantization.linear import (
    QuantizationMode,
    QuantizedLinear,
    fresh_code_books,
    keep_weights_of_recompute,
    quantize_linear,
)
from ssmlora_dist.quantization.mxfp4 import dequantize_mxfp4
from ssmlora_dist.quantization.sizes import stored_bytes

__all__ = [
    "QuantizationMode",
    "QuantizedExperts",
    "QuantizedLinear",
    "dequantize_mxfp4",
    "dequantized_weight",
    "expert_weights",
    "fresh_code_books",
    "is_quantized",
    "keep_weights_of_recompute",
    "quantize_experts",
    "quantize_linear",
    "stored_as",
    "stored_bytes",
]
