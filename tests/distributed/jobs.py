"""What the ranks of `worker.py` do: training runs as overrides of `configs/debug_tiny.json`, and steps."""

from __future__ import annotations

import json

Overrides = tuple[str, ...]

# Rows of 3 to 60 target tokens: a mean of means is far from the mean over all target tokens.
ROWS_FILE = "rows.jsonl"
ROWS = [
    {"instruction": f"Repeat {word} {count} times.", "output": " ".join([word] * count)}
    for word, count in (
        ("ab", 1),
        ("xyz", 15),
        ("q", 4),
        ("mno", 9),
        ("k", 1),
        ("uvw", 12),
        ("d", 2),
        ("ef", 20),
    )
]
_SOURCE = f'{{"format":"instruction","path":"{ROWS_FILE}"}}'

# Four steps of four sequences. The norm is clipped in each of them, so that DeepSpeed's clipping is compared
# with our own as well.
COMMON: Overrides = (
    "model.config.num_hidden_layers=4",
    f"data.train={_SOURCE}",
    "data.validation=null",
    "training.max_steps=4",
    "training.global_batch_size=4",
    "training.warmup_steps=1",
    "training.max_grad_norm=0.25",
    "evaluation.every_steps=null",
    "tracking.tracker=none",
)

REFERENCE = "zero 0"
TOPOLOGIES: dict[str, Overrides] = {
    REFERENCE: ("parallel.zero_stage=0",),
    "zero 1": ("parallel.zero_stage=1",),
    "zero 2": ("parallel.zero_stage=2",),
    "zero 3": ("parallel.zero_stage=3",),
    "zero 1, optimizer offloaded": ("parallel.zero_stage=1", "parallel.offload_optimizer=true"),
    "zero 2, optimizer offloaded": ("parallel.zero_stage=2", "parallel.offload_optimizer=true"),
    "zero 3, optimizer offloaded": ("parallel.zero_stage=3", "parallel.offload_optimizer=true"),
    "zero 3, parameters offloaded": ("parallel.zero_stage=3", "parallel.offload_parameters=true"),
    # As with a real backbone, whose matrices are too large to stay gathered.
    "zero 3, nothing persistent": (
        "parallel.zero_stage=3",
        'deepspeed.zero_optimization={"stage3_param_persistence_threshold":0}',
    ),
    "zero 3, both offloaded": (
        "parallel.zero_stage=3",
        "parallel.offload_optimizer=true",
        "parallel.offload_parameters=true",
    ),
}

# What a sample drops depends on its place in the global batch alone. Evaluation must leave dropout on.
DROPOUT = "dropout"
_DROPOUT: Overrides = ("adapter.dropout=0.3", 'adapter.every_layer=["o_proj","up_proj"]')
DROPPING: dict[str, Overrides] = {
    DROPOUT: _DROPOUT,
    "dropout, zero 2": (*_DROPOUT, *TOPOLOGIES["zero 2"]),
    "dropout, micro-batch 2": (*_DROPOUT, "training.micro_batch_size=2"),
    # Ranks have rows of different lengths, and must call the modules of every tile equally often.
    "dropout, memory spared, zero 3": (
        *_DROPOUT,
        *TOPOLOGIES["zero 3, nothing persistent"],
        "training.mlp_tile_size=32",
        "training.layers_per_checkpoint=3",
        "training.offload_checkpoints=true",
    ),
}
# Modules that are trained whole, and positions that reach further.
SAVED: Overrides = (
    'adapter.modules_to_save=["embed_tokens","norm","input_layernorm","lm_head"]',
    'model.rope_parameters={"rope_type":"yarn","factor":4}',
)
# Groups of parameters, of which ZeRO makes flat parts of their own.
RATES: dict[str, Overrides] = {
    f"rates, {name}": (
        *TOPOLOGIES[name],
        *SAVED,
        "training.lora_b_learning_rate_ratio=4",
        "training.state_learning_rate_ratio=0.5",
    )
    for name in (REFERENCE, "zero 1", "zero 2, optimizer offloaded", "zero 3, nothing persistent")
}
# Two or three examples a row, of which there are four in a batch as well.
PACKED: dict[str, Overrides] = {
    f"packed, {name}": (*_DROPOUT, "data.packing=true", "data.max_length=160", *overrides)
    for name, overrides in {
        REFERENCE: (),
        "zero 3": TOPOLOGIES["zero 3, nothing persistent"],
        "micro-batch 2": ("training.micro_batch_size=2",),
    }.items()
}
_WITHOUT_EVALUATION: dict[str, Overrides] = {**TOPOLOGIES, **DROPPING}

# Three examples, so that two ranks do not share them evenly.
_EVALUATION: Overrides = (
    f"data.validation={_SOURCE}",
    "evaluation.num_examples=3",
    "evaluation.every_steps=1",
)
EVALUATED: dict[str, Overrides] = {
    f"{name}, evaluated": (*_WITHOUT_EVALUATION[name], *_EVALUATION)
    for name in (REFERENCE, "zero 3, nothing persistent", DROPOUT)
}

# Two experts of six for each token.
_MIXTURE_CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 259,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}


def mixture(num_layers: int) -> Overrides:
    """In the place of the tiny Llama, a model whose layers are of experts."""
    return (f"model.config={json.dumps({**_MIXTURE_CONFIG, 'num_hidden_layers': num_layers})}",)


# As a real backbone is kept, and evaluated in between: bitsandbytes' own 4-bit layers pass no gradient then.
QUANTIZED: dict[str, Overrides] = {
    f"{kind} in bfloat16, {name}": (
        *overrides,
        *TOPOLOGIES[name],
        "model.compute_dtype=bfloat16",
        *_EVALUATION,
    )
    for kind, overrides in {
        "nf4": ("quantization.mode=nf4",),
        "int8": ("quantization.mode=int8",),
        "experts": ("quantization.mode=nf4", *mixture(4)),
    }.items()
    for name in (REFERENCE, "zero 3, nothing persistent")
}

# Chunks of the loss so short that the ranks have different numbers of them.
MICRO_BATCHES: dict[str, Overrides] = {
    f"micro-batch {size}, {name}": (
        f"training.micro_batch_size={size}",
        "training.loss_chunk_size=16",
        "quantization.mode=none",
        *TOPOLOGIES[name],
    )
    for size, name in (
        (1, REFERENCE),
        (2, REFERENCE),
        (4, REFERENCE),
        (1, "zero 2"),
        (2, "zero 2"),
        (1, "zero 3, nothing persistent"),
    )
}

# Embedding and head are one parameter, which ZeRO 3 shards once.
TIED: dict[str, Overrides] = {
    f"tied, {name}": (*TOPOLOGIES[name], "model.config.tie_word_embeddings=true")
    for name in (REFERENCE, "zero 3", "zero 3, nothing persistent")
}

HALF: dict[str, Overrides] = {
    f"float16, {name}": (*TOPOLOGIES[name], "model.compute_dtype=float16", "quantization.mode=none")
    for name in (REFERENCE, "zero 1", "zero 2", "zero 3", "zero 2, optimizer offloaded")
}

JOBS: dict[str, Overrides] = {
    **_WITHOUT_EVALUATION,
    **EVALUATED,
    **PACKED,
    **QUANTIZED,
    **MICRO_BATCHES,
    **TIED,
    **HALF,
    **RATES,
    "auto": ("model.compute_dtype=auto",),
}


STAGES = (0, 1, 2, 3)
POISONS = ("no poison", "gradients", "loss", "overflow", "rehearsed")
"""What makes the second of three steps of a tiny model not finite; `overflow`: the loss scale."""


def fits(name: str, num_ranks: int) -> bool:
    """Whether a job's micro-batches fit into the global batch on so many ranks."""
    return not name.startswith("micro-batch 4") or num_ranks == 1


def run_name(name: str, num_ranks: int) -> str:
    """The name of a job's run directory."""
    return f"{name.replace(',', '').replace(' ', '-')}-on-{num_ranks}"


def result_file(rank: int, num_ranks: int) -> str:
    """Where a rank writes what it found."""
    return f"rank-{rank}-of-{num_ranks}.json"
