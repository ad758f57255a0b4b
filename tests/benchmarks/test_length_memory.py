"""What a training step's memory grows by with the length of its input, counted at small sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.length_memory import Features, Step

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}
SHORT, LONG, TILE_SIZE, CHUNK_SIZE = 256, 512, 32, 16
# Hidden states and the state of two axes at rank 8, in bfloat16: what a layer is recomputed from.
INPUT_BYTES = 2 * (64 + 2 * 8)
# Three tensors of the MLP's width in bfloat16: what tiles cut out of a layer's working set, at least.
MLP_BYTES = 2 * 3 * 256
WAYS = {
    "plain": Features(),
    "offloaded": Features(offload=True),
    "tiled": Features(tile_size=TILE_SIZE),
    "both": Features(offload=True, tile_size=TILE_SIZE),
}


def growths(**changes: Any) -> dict[str, float]:
    """Bytes that a token more takes, by way."""
    step = Step(SHAPE | changes, CHUNK_SIZE)
    found = {}
    for name, features in WAYS.items():
        counted = [step.count(num_tokens, features) for num_tokens in (SHORT, LONG)]
        assert {each.logit_rows for each in counted} == {CHUNK_SIZE}, "logits of a chunk are all that exists"
        found[name] = (counted[1].peak_bytes - counted[0].peak_bytes) / (LONG - SHORT)
    return found


def test_a_token_takes_one_layers_working_set_outside_its_mlp() -> None:
    few, deep, wide = growths(), growths(num_hidden_layers=6), growths(intermediate_size=512)
    # Checkpoints: of every layer, or of none.
    for way, expected in (
        ("plain", 4 * INPUT_BYTES),
        ("tiled", 4 * INPUT_BYTES),
        ("offloaded", 0),
        ("both", 0),
    ):
        added = deep[way] - few[way]
        assert abs(added - expected) <= 0.25 * INPUT_BYTES, f"{way}: {added} bytes for four layers more"
    # The MLP: as wide as it is, or of a tile.
    for way in ("plain", "offloaded"):
        assert few[way] - few["both"] >= MLP_BYTES
        assert wide[way] - few[way] >= MLP_BYTES
    for way in ("tiled", "both"):
        assert wide[way] <= few[way]


def test_what_leaves_the_device_is_in_host_memory() -> None:
    step = Step(SHAPE | {"num_hidden_layers": 6}, CHUNK_SIZE)
    plain, offloaded = (step.count(SHORT, WAYS[way]) for way in ("plain", "offloaded"))
    assert plain.host_bytes == 0
    # The first layer receives no state.
    assert offloaded.host_bytes == SHORT * (6 * INPUT_BYTES - 2 * 2 * 8)
