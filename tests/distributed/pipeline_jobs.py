"""What the ranks of `pipeline_worker.py` train: every split of four layers, every kind of adapted model."""

from __future__ import annotations

import json
from itertools import combinations, cycle, product

from ..decoders import bare_config
from .jobs import ROWS_FILE, SAVED, Overrides, mixture

NUM_LAYERS = 4
NUM_STEPS = 20
# Of every kind of model, adapter and data, each at a few splits; the splits themselves take all steps.
_FEW_STEPS: Overrides = ("training.max_steps=6",)
_SOURCE = f'{{"format":"instruction","path":"{ROWS_FILE}"}}'

# Rows of different lengths, so micro-batches too; the norm is clipped in most steps.
COMMON: Overrides = (
    f"model.config.num_hidden_layers={NUM_LAYERS}",
    f"data.train={_SOURCE}",
    "data.validation=null",
    f"training.max_steps={NUM_STEPS}",
    "training.global_batch_size=4",
    "training.warmup_steps=1",
    "training.max_grad_norm=0.25",
    "training.loss_chunk_size=16",
    "quantization.mode=none",
    "evaluation.every_steps=null",
    "tracking.tracker=none",
)
EVALUATION: Overrides = (
    f"data.validation={_SOURCE}",
    "evaluation.every_steps=3",
    "evaluation.num_examples=5",
    "evaluation.micro_batch_size=2",
    *_FEW_STEPS,
)

_SEVEN = 'adapter.every_layer=["k_proj","o_proj","gate_proj","up_proj","down_proj"]'
_PLACEMENTS: dict[str, Overrides] = {
    "q v": (),
    "all seven": (_SEVEN, "adapter.every_layer_method=ssmlora"),
}
# Any three of the four settings in all combinations.
VARIANTS: dict[str, Overrides] = {
    f"{dtype}, {gradient}, {placement}, checkpointing {checkpointing}": (
        f"model.compute_dtype={dtype}",
        f"adapter.state_gradient={gradient}",
        f"training.gradient_checkpointing={checkpointing}",
        *overrides,
    )
    for (a, dtype), (b, gradient), (c, (placement, overrides)) in product(
        enumerate(("float32", "bfloat16")), enumerate(("full", "detached")), enumerate(_PLACEMENTS.items())
    )
    for checkpointing in [("true", "false")[(a + b + c) % 2]]
}
SPLITS = [(0, *inner) for stages in (2, 3, 4) for inner in combinations(range(1, NUM_LAYERS), stages - 1)]
_NAMES = list(VARIANTS)
# Of which the first and the last stage each read one half.
TIED_DIRECTORY = "tied"
# Time modules drop of their state, plain LoRA of its input.
_DROPOUT = ("adapter.dropout=0.3", _SEVEN, *_FEW_STEPS)
_TILED = (*_DROPOUT, "training.mlp_tile_size=32")
_SPARED = ("training.layers_per_checkpoint=2", "training.offload_checkpoints=true")
_PLACES = (
    'adapter.places=["1.q_proj","1.up_proj","2.down_proj","3.q_proj"]',
    "adapter.alternate=[]",
    *_FEW_STEPS,
)
_SIZES = {
    "vocab_size": 259,
    "num_hidden_layers": NUM_LAYERS,
    "max_position_embeddings": 512,
    "pad_token_id": 258,
}
# What they do before their first layer and behind the last, they must do once; fused projections.
_OTHERS: dict[str, Overrides] = {
    model_type: (
        f"model.config={json.dumps(bare_config(model_type) | _SIZES)}",
        f"adapter.alternate={json.dumps(alternate)}",
        "adapter.every_layer=all-linear",
        *_FEW_STEPS,
    )
    for model_type, alternate in (
        ("granite", ["q_proj", "v_proj"]),
        ("gpt_neox", ["query_key_value", "attention.dense"]),
    )
}
_PACKED = (*_DROPOUT, *SAVED, "data.packing=true", "data.max_length=160")
_ONE_KEY_HEAD = ("model.config.num_key_value_heads=1",)
# A copy of the embedding is trained, and the head, tied to the embedding, stays as it is.
_TIED = (
    f'model={{"path":"{TIED_DIRECTORY}","tokenizer":"bytes","compute_dtype":"bfloat16"}}',
    'adapter.modules_to_save=["embed_tokens","norm"]',
    *_FEW_STEPS,
)


def _split(boundaries: tuple[int, ...], ahead: int | str = "auto") -> Overrides:
    return (
        f"parallel.pipeline_stages={len(boundaries)}",
        f"parallel.stage_boundaries={list(boundaries)}",
        f"parallel.recompute_ahead={ahead}",
    )


# Job -> (ranks, overrides, the job that it must equal bit for bit).
PLAIN: dict[str, tuple[int, Overrides]] = {
    **{name: (1, overrides) for name, overrides in VARIANTS.items()},
    "few steps": (1, (*VARIANTS[_NAMES[0]], *_FEW_STEPS)),
    "nf4": (1, ("quantization.mode=nf4", "model.compute_dtype=bfloat16", *EVALUATION)),
    "experts": (
        1,
        (*mixture(NUM_LAYERS), "quantization.mode=nf4", "model.compute_dtype=bfloat16", *EVALUATION),
    ),
    "float16": (1, ("model.compute_dtype=float16", *EVALUATION)),
    "lora": (1, ("adapter.method=lora", *SAVED, *_FEW_STEPS)),
    "tied from a file": (1, _TIED),
    "dropout": (1, _DROPOUT),
    "packed": (1, _PACKED),
    "places": (1, _PLACES),
    "tiled": (1, _TILED),
    **{model_type: (1, overrides) for model_type, overrides in _OTHERS.items()},
    "one key-value head": (1, (*_ONE_KEY_HEAD, *VARIANTS[_NAMES[0]], *EVALUATION)),
    # First of all on two ranks: DeepSpeed keeps the process groups of a pipeline in globals.
    "two ranks": (2, VARIANTS[_NAMES[0]]),
}
# Rows that ranks share, in other sums. Before any pipeline: a process that had one makes no other engine.
SEQUENCE: dict[str, tuple[int, Overrides, str]] = {
    "shared rows": (2, (*VARIANTS[_NAMES[0]], "parallel.sequence_parallel=2"), _NAMES[0]),
    "shared rows of packed samples": (2, (*_PACKED, "parallel.sequence_parallel=2"), "packed"),
    "rows shared by four": (4, (*VARIANTS[_NAMES[0]], "parallel.sequence_parallel=4"), _NAMES[0]),
    "rows shared at ZeRO 3 on two ranks each, memory spared": (
        4,
        (
            *PLAIN["few steps"][1],
            "parallel.sequence_parallel=2",
            "parallel.zero_stage=3",
            "training.mlp_tile_size=32",
            *_SPARED,
        ),
        "few steps",
    ),
    "shared rows of one key-value head": (
        2,
        (*_ONE_KEY_HEAD, *VARIANTS[_NAMES[0]], "parallel.sequence_parallel=2", *EVALUATION),
        "one key-value head",
    ),
}
# Every split, and every kind of model.
SPLIT: dict[str, tuple[int, Overrides, str]] = {
    f"{variant} at {boundaries}": (
        len(boundaries),
        (*VARIANTS[variant], *_split(boundaries, ("auto", 0, 1, 2)[index % 4])),
        variant,
    )
    for index, (boundaries, variant) in enumerate(zip(cycle(SPLITS), _NAMES, strict=False))
} | {
    "nf4 in stages": (2, (*PLAIN["nf4"][1], *_split((0, 2))), "nf4"),
    "experts in stages": (2, (*PLAIN["experts"][1], *_split((0, 2))), "experts"),
    "float16 in stages": (2, (*PLAIN["float16"][1], *_split((0, 2))), "float16"),
    "lora in stages": (3, (*PLAIN["lora"][1], *_split((0, 2, 3))), "lora"),
    "packed in stages": (2, (*_PACKED, *_split((0, 3), 1)), "packed"),
    "tied from a file in two": (2, (*_TIED, *_split((0, 3))), "tied from a file"),
    "tied from a file in three": (3, (*_TIED, *_split((0, 1, 3))), "tied from a file"),
    **{
        f"dropout at {boundaries}, {ahead} ahead": (
            len(boundaries),
            (*_DROPOUT, *_split(boundaries, ahead)),
            "dropout",
        )
        for boundaries, ahead in (((0, 3), 0), ((0, 3), 2), ((0, 3), "auto"), ((0, 1, 2, 3), 1))
    },
    **{
        f"{model_type} in two": (2, (*overrides, *_split((0, 3), 1)), model_type)
        for model_type, overrides in _OTHERS.items()
    },
    # The first layer has no adapter; of three stages the second has none on the axis of q_proj.
    "places in two": (2, (*_PLACES, *_split((0, 3), 1)), "places"),
    "places in three": (3, (*_PLACES, *_split((0, 2, 3))), "places"),
    "memory spared in two": (2, (*_TILED, *_SPARED, *_split((0, 3), 1)), "tiled"),
    "balanced": (2, (*VARIANTS[_NAMES[0]], "parallel.pipeline_stages=2"), _NAMES[0]),
}
# Within a tolerance: other sums.
NEAR: dict[str, tuple[int, Overrides, str]] = {
    "zero 1": (2, (*VARIANTS[_NAMES[0]], *_split((0, 3)), "parallel.zero_stage=1"), _NAMES[0]),
    "float16, zero 1": (2, (*PLAIN["float16"][1], *_split((0, 3)), "parallel.zero_stage=1"), "float16"),
    "two stages on two ranks each": (4, (*VARIANTS[_NAMES[0]], *_split((0, 3))), "two ranks"),
    "dropout in two stages on two ranks each": (4, (*_DROPOUT, *_split((0, 3))), "dropout"),
    "zero 1 on two ranks each": (
        4,
        (*PLAIN["few steps"][1], *_split((0, 3)), "parallel.zero_stage=1"),
        "few steps",
    ),
}
JOBS: dict[str, tuple[int, Overrides]] = {
    **PLAIN,
    **{name: (ranks, overrides) for name, (ranks, overrides, _) in {**SEQUENCE, **SPLIT, **NEAR}.items()},
}


def directory_name(job: str) -> str:
    """A run name for a job."""
    return "".join(letter if letter.isalnum() else "-" for letter in job)
