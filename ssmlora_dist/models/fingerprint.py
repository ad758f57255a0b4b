"""What an adapter remembers of its base model, to refuse another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ssmlora_dist.models.configuration import load_config
from ssmlora_dist.models.location import locate
from ssmlora_dist.models.weights import SafetensorsWeights, initializer_std

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SAMPLED_BYTES = 1024
SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def base_fingerprint(
    path: str | None = None,
    *,
    init: Literal["pretrained", "random"] = "pretrained",
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> str:
    """sha256 (hexadecimal) that tells base models apart.

    Of a pretrained model: its shapes, and each tensor's name, dtype, shape, first and last kB. It is the same
    for a directory and a hub name with the same weights, however they are sharded, and knows nothing of
    quantisation or compute dtype. Of a random one: its shapes, the scale of its weights and the seed.

    Args:
        path: a directory or hub name, as for `load_model`.
        init: whether the weights are stored (`pretrained`) or drawn from `seed` (`random`).
        config: a bare configuration, for random weights.
        revision: on the hub.
        seed: of random weights.

    Raises:
        ModelError: the model cannot be found or read.
    """
    model_config = load_config(path, config=config, revision=revision)
    content: dict[str, Any] = _shapes(model_config)
    if init == "random":
        content |= {"seed": seed, "initializer_std": initializer_std(model_config)}
    else:
        assert path is not None, "a pretrained model has a path"
        content["weights"] = SafetensorsWeights(locate(path, revision, weights=True)).digest(SAMPLED_BYTES)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shapes(config: PreTrainedConfig) -> dict[str, Any]:
    text_config = config.get_text_config()
    shapes: dict[str, Any] = {key: getattr(text_config, key, None) for key in SHAPE_KEYS}
    shapes["head_dim"] = getattr(text_config, "head_dim", None)
    if shapes["head_dim"] is None and shapes["num_attention_heads"]:
        shapes["head_dim"] = shapes["hidden_size"] // shapes["num_attention_heads"]
    return shapes
