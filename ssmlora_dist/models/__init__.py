"""Decoder families, streaming weight loading, tokenizers; transformers is imported at the first use."""

from ssmlora_dist.models.configuration import load_config, max_positions
from ssmlora_dist.models.families import (
    FAMILIES,
    Family,
    decoder_layers,
    projection_path,
    require_supported,
)
from ssmlora_dist.models.fingerprint import base_fingerprint
from ssmlora_dist.models.loading import load_model
from ssmlora_dist.models.tokenizer import load_tokenizer
from ssmlora_dist.models.weights import stored_dtype

__all__ = [
    "FAMILIES",
    "Family",
    "base_fingerprint",
    "decoder_layers",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_positions",
    "projection_path",
    "require_supported",
    "stored_dtype",
]
