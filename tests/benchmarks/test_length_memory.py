"""What a training step's memory grows by with the length of its input, counted at small sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.length_memory import Features, Step

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHORT, LONG, TILE_SIZE, CHUNK_SIZE = 48, 72, 24, 24
# Hidden states and the state of two axes at rank 8, in bfloat16: what a layer is recomputed from.
STATE_BYTES = 2 * 2 * 8
INPUT_BYTES = 2 * 64 + STATE_BYTES
# Three tensors of the MLP's width in bfloat16: what tiles cut out of a layer's working set, at least.
MLP_BYTES = 2 * 3 * 256
WAYS = {"plain": Features(), "spared": Features(offload=True, tile_size=TILE_SIZE)}


def growths(**changes: Any) -> tuple[dict[str, float], dict[str, int]]:
    """By way, bytes that a token more takes on the device, and those in host memory for the longer row."""
    step = Step(SHAPE | changes, CHUNK_SIZE)
    growth, on_host = {}, {}
    for name, features in WAYS.items():
        short, long = (step.count(num_tokens, features) for num_tokens in (SHORT, LONG))
        assert short.logit_rows == long.logit_rows == CHUNK_SIZE, "logits of a chunk are all that exists"
        growth[name] = (long.peak_bytes - short.peak_bytes) / (LONG - SHORT)
        on_host[name] = long.host_bytes
    return growth, on_host


def test_a_token_takes_one_layers_working_set_outside_mlp_and_norms() -> None:
    few, _ = growths()
    deep, on_host = growths(num_hidden_layers=5)
    wide, _ = growths(intermediate_size=512)
    # Checkpoints: of every layer, or of none.
    assert deep["plain"] - few["plain"] == 2 * INPUT_BYTES
    assert 0 <= deep["spared"] - few["spared"] <= STATE_BYTES, "of three layers none has two behind it"
    # The first layer receives no state.
    assert on_host == {"plain": 0, "spared": LONG * (5 * INPUT_BYTES - STATE_BYTES)}
    # The MLP: as wide as it is, or of a tile.
    assert few["plain"] - few["spared"] >= MLP_BYTES
    assert wide["plain"] - few["plain"] >= MLP_BYTES
    assert wide["spared"] <= few["spared"]
    # Neither what norms compute in float32 nor a gradient for every tile exists for all tokens.
    assert few["spared"] < 10 * INPUT_BYTES
