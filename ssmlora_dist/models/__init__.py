"""The structure of any decoder, streaming weight loading, tokenizers; transformers is imported when used."""

from ssmlora_dist.models.configuration import load_config, max_positions
from ssmlora_dist.models.fingerprint import base_fingerprint
from ssmlora_dist.models.loading import load_model
from ssmlora_dist.models.structure import Structure, decoder_layers, empty_model, structure_of
from ssmlora_dist.models.tokenizer import load_tokenizer
from ssmlora_dist.models.tokenizer_contents import fix_date, tokenizer_digests
from ssmlora_dist.models.weights import stored_dtype

__all__ = [
    "Structure",
    "base_fingerprint",
    "decoder_layers",
    "empty_model",
    "fix_date",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_positions",
    "stored_dtype",
    "structure_of",
    "tokenizer_digests",
]
