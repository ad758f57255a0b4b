"""What `model.compute_dtype: "auto"` stands for in a run: settled once, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence

from ssmlora_dist.config.schema import RunConfig
from ssmlora_dist.config.topology import topology_problems
from ssmlora_dist.distributed.context import DistributedContext
from ssmlora_dist.errors import ConfigError
from ssmlora_dist.precision import BFLOAT16_CAPABILITY, DTypeName, common_dtype, machine_dtype
from ssmlora_dist.tracking import Console

_BECAUSE = {
    "bfloat16": "the device multiplies it natively",
    "float16": "the device does not multiply bfloat16 natively; the loss is scaled",
    "float32": "this CPU does not multiply bfloat16 natively",
}


def settle_compute_dtype(
    config: RunConfig,
    context: DistributedContext,
    console: Console,
    *,
    kept: DTypeName | None = None,
    for_training: bool = True,
) -> RunConfig:
    """The configuration with a compute dtype by name, the same on every rank; every rank calls it.

    Args:
        config: of the run; a dtype that it names itself stays, with a warning where GPUs are slow in it.
        context: the run's processes.
        console: of rank 0; shows what was chosen, and why.
        kept: what the adapter to go on with has been trained in; None: whatever all ranks do best.
        for_training: as for `config.loading.load_config`.

    Raises:
        ConfigError: other settings do not go with it.
    """
    named = config.model.compute_dtype
    if named == "bfloat16" and context.device.type == "cuda":
        slow = [rank for rank, best in enumerate(context.gather(machine_dtype("cuda"))) if best != named]
        if slow:
            console.warn(
                f"model.compute_dtype: bfloat16 given; rank {slow[0]}'s GPU does not multiply it natively "
                f"(its compute capability is below {'.'.join(map(str, BFLOAT16_CAPABILITY))}), so that it is "
                "slow there; float16 is fast, and what auto takes"
            )
    if named != "auto":
        return config
    choices: list[DTypeName] = context.gather(machine_dtype(context.device.type))
    settled, chosen = choose_compute_dtype(
        config, choices, context.device.type, context.world_size, kept=kept, for_training=for_training
    )
    console.message(chosen)
    return settled


def choose_compute_dtype(
    config: RunConfig,
    choices: Sequence[DTypeName],
    device_type: str,
    world_size: int,
    *,
    kept: DTypeName | None = None,
    for_training: bool = True,
) -> tuple[RunConfig, str]:
    """What "auto" stands for, and a line that says so and why.

    Args:
        config: of the run, whose dtype is "auto".
        choices: what the ranks' machines do best.
        device_type: where the run computes.
        world_size: number of ranks.
        kept: as for `settle_compute_dtype`.
        for_training: as for `settle_compute_dtype`.

    Raises:
        ConfigError: other settings do not go with it.
    """
    here = common_dtype(choices)
    because = _BECAUSE[here]
    if len(set(choices)) > 1:
        because = f"what all ranks can do: alone they would take {' or '.join(sorted(set(choices)))}"
    if kept is not None:
        because = "what the adapter was trained in"
        if kept != here:
            because += f", though {here} would be faster here"
    settled = config.with_auto_dtype(kept or here)
    problems = topology_problems(
        settled, world_size=world_size, device_type=device_type, for_training=for_training
    )
    chosen = f"compute dtype {settled.model.compute_dtype} (auto: {because})"
    if problems:
        raise ConfigError(problems, source=chosen)
    return settled, chosen
