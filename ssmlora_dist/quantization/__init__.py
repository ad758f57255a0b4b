"""Frozen linear layers in 4 and 8 bits; the only importer of bitsandbytes."""

from ssmlora_dist.quantization.linear import (
    QuantizationMode,
    QuantizedLinear,
    dequantized_weight,
    is_quantized,
    keep_weights_of_recompute,
    quantize_linear,
    stored_as,
)

__all__ = [
    "QuantizationMode",
    "QuantizedLinear",
    "dequantized_weight",
    "is_quantized",
    "keep_weights_of_recompute",
    "quantize_linear",
    "stored_as",
]
