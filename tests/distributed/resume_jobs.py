"""What the ranks of `resume_worker.py` train: runs on every topology, continued on it and on others."""

from __future__ import annotations

from itertools import pairwise

from .jobs import ROWS_FILE, SAVED, Overrides

NUM_STEPS, MIDDLE = 12, 6
_SOURCE = f'{{"format":"instruction","path":"{ROWS_FILE}"}}'
# Blocks that end neither with the steps nor with the rows.
_STREAM = f'{{"format":"instruction","path":"{ROWS_FILE}","streaming":true,"shuffle_buffer_size":7}}'

COMMON: Overrides = (
    "model.config.num_hidden_layers=4",
    f"data.train={_SOURCE}",
    "data.validation=null",
    "adapter.dropout=0.2",
    f"training.max_steps={NUM_STEPS}",
    "training.global_batch_size=4",
    "training.warmup_steps=1",
    "training.max_grad_norm=0.25",
    f"checkpoint.every_steps={MIDDLE}",
    "checkpoint.keep=9",
    "evaluation.every_steps=null",
    "tracking.tracker=none",
)
# So few that the loss scale of float16 changes before the middle and behind it.
STEADY_STEPS = 3
# Name -> ranks, overrides. Those with stages come last: a process that had one makes no other engine.
TOPOLOGIES: dict[str, tuple[int, Overrides]] = {
    "dp1": (1, ()),
    "dp2": (2, ()),
    "zero3": (2, ("parallel.zero_stage=3",)),
    "pp2": (2, ("parallel.pipeline_stages=2",)),
    "pp2dp2": (4, ("parallel.pipeline_stages=2",)),
}
# Not continued on every other.
OTHERS: dict[str, tuple[int, Overrides]] = {
    "zero1": (2, ("parallel.zero_stage=1",)),
    "zero2": (2, ("parallel.zero_stage=2",)),
    "offload": (2, ("parallel.zero_stage=2", "parallel.offload_optimizer=true")),
    "zero3offload": (
        2,
        ("parallel.zero_stage=3", "parallel.offload_optimizer=true", "parallel.offload_parameters=true"),
    ),
    "sp2": (2, ("parallel.sequence_parallel=2",)),
    "float16": (1, ("model.compute_dtype=float16",)),
    "pp2float16": (2, ("model.compute_dtype=float16", "parallel.pipeline_stages=2")),
    "pp2zero1": (2, ("parallel.pipeline_stages=2", "parallel.zero_stage=1")),
}
STREAMED: dict[str, tuple[int, Overrides]] = {
    f"streamed-{name}": (
        TOPOLOGIES[name][0],
        (*TOPOLOGIES[name][1], f"data.train={_STREAM}", "data.packing=true", "data.max_length=160"),
    )
    for name in ("dp1", "zero3", "pp2")
}
# With forms of the state that the package does not know, one of which reads all axes.
_OWN_FORMS: Overrides = (
    "adapter.form_module=tests.own_forms",
    "adapter.method=mixing",
    'adapter.every_layer=["o_proj"]',
    "adapter.every_layer_method=fading",
    'adapter.form_settings={"decay":0.8}',
)
OWN_FORMS: dict[str, tuple[int, Overrides]] = {
    f"own-{name}": (TOPOLOGIES[name][0], (*TOPOLOGIES[name][1], *_OWN_FORMS))
    for name in ("dp1", "zero3", "pp2")
}
# Groups of parameters, of which ZeRO makes flat parts of their own.
RATES: dict[str, tuple[int, Overrides]] = {
    f"rates-{name}": (
        num_ranks,
        (
            *overrides,
            *SAVED,
            "training.lora_b_learning_rate_ratio=4",
            "training.state_learning_rate_ratio=0.5",
        ),
    )
    for name, (num_ranks, overrides) in (TOPOLOGIES | OTHERS).items()
    if name in ("dp1", "zero2", "zero3", "pp2", "pp2zero1")
}
# Their places are chosen before training, and kept when they go on.
_PROBED: Overrides = ("adapter.placement=probe", "adapter.probe_batches=3", "adapter.dropout=0")
PROBED: dict[str, tuple[int, Overrides]] = {
    "probed-dp1": (1, _PROBED),
    "probed-zero2": (2, (*_PROBED, "parallel.zero_stage=2")),
}
RUNS = dict(
    sorted(
        {**TOPOLOGIES, **OTHERS, **STREAMED, **OWN_FORMS, **RATES, **PROBED}.items(),
        key=lambda run: "pipeline" in str(run[1][1]),
    )
)


def _in_turn(names: list[str]) -> list[tuple[str, str]]:
    """Each continued on the next one: a checkpoint knows nothing of its topology."""
    return list(pairwise([*names, names[0]]))


PAIRS = [
    *((name, name) for name in RUNS),
    *_in_turn(list(TOPOLOGIES)),
    *_in_turn(list(STREAMED)),
    ("dp1", "sp2"),
    ("sp2", "dp1"),
    ("own-zero3", "own-pp2"),
    ("rates-zero3", "rates-pp2"),
    ("rates-pp2", "rates-zero2"),
    ("probed-dp1", "probed-zero2"),
]


def continued(then: str, now: str) -> str:
    """The name of a run that was begun on one topology and continued on another."""
    return f"{then}-then-{now}"
