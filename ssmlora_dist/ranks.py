"""Who this process is among the processes of its run: the one reader of what launchers leave behind.

torchrun and DeepSpeed's launcher set all of `VARIABLES`. Slurm's `srun` starts processes that know their
number and nothing of each other: where they meet follows from the step's nodes and the job's number. The
processes of an MPI's `mpirun` must be told where. A process that nobody has given a number is alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ssmlora_dist.errors import ConfigError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
VARIABLES = (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT")
"""What says who a process is and where the others are; given all together."""
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
_SLURM_STEP = ("SLURM_PROCID", "SLURM_STEP_ID")
OF_A_RANK = (*VARIABLES, *_LOCAL_SIZES, *_OPEN_MPI, *_PMI, *_SLURM_STEP)
"""What a process must not inherit to be alone."""

# Numbers from here on are those of a batch script, an interactive shell and the like.
_FIRST_SPECIAL_STEP = 0xFFFF0000
# Below those that the kernel gives to connections that go out.
_FIRST_PORT, _NUM_PORTS = 15000, 15000
_REMEDY = (
    "start it with `deepspeed launch/...`, torchrun or srun, which set all of "
    f"{', '.join(VARIABLES)}, or unset them for a run of one process"
)


@dataclass(frozen=True)
class LaunchEnvironment:
    """One process among the processes of its run.

    Attributes:
        rank: index of the process.
        world_size: number of processes.
        local_rank: index of the process on its node.
        address: host on which rank 0 can be found; None: the process is alone.
        port: of rank 0 there.
        local_world_size: number of processes on its node, as far as that is known.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str | None = None
    port: int | None = None
    local_world_size: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "local_world_size", self.local_world_size or self.world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints, tracks and writes."""
        return self.rank == 0


def read_launch_environment(environment: Mapping[str, str] = os.environ) -> LaunchEnvironment:
    """Where the process with this environment stands.

    Raises:
        ConfigError: the environment says half of it, or something that cannot be.
    """
    given = {name: value for name, value in environment.items() if value}
    # By what each of our own variables is called there.
    names = {name: name for name in VARIABLES}
    found = {name: given[name] for name in VARIABLES if name in given}
    if len(found) < len(VARIABLES):
        names |= _manager(given, is_told=bool(found))
        _add(found, given, names)
    if not found:
        return LaunchEnvironment()
    missing = [name for name in VARIABLES if name not in found]
    if missing:
        raise _refusal(_missing(found, missing, names))
    world_size = _number(found, names, "WORLD_SIZE", 1)
    last, why = world_size - 1, f" (below {names['WORLD_SIZE']} {world_size})"
    return LaunchEnvironment(
        _number(found, names, "RANK", 0, last, why),
        world_size,
        _number(found, names, "LOCAL_RANK", 0, last, why),
        found["MASTER_ADDR"],
        _number(found, names, "MASTER_PORT", 1, 2**16 - 1),
        _local_world_size(given, names),
    )


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: `node03` of `node[03-05,9],other`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else nodes


def _manager(given: Mapping[str, str], *, is_told: bool) -> dict[str, str]:
    """What those that started this process beside others call our numbers; empty: it was started alone.

    One process is alone, unless it is told where to meet with others.
    """
    for names in (_OPEN_MPI, _slurm_names(given), _PMI):
        if names and names[1] in given and (is_told or given[names[1]] != "1"):
            return dict(zip(_NUMBERS, names, strict=True))
    return {}


def _slurm_names(given: Mapping[str, str]) -> tuple[str, ...]:
    """Slurm's names of rank, world size and local rank; none outside the tasks of a step."""
    step = _whole(given.get("SLURM_STEP_ID", ""))
    # In a shell that srun opened its numbers are the shell's.
    in_a_step = step is not None and step < _FIRST_SPECIAL_STEP and "SLURM_PTY_PORT" not in given
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in given else "SLURM_NTASKS"
    # Daemons of an MPI are tasks too: it counts its ranks otherwise.
    of_an_mpi = "PMI_SIZE" in given and given["PMI_SIZE"] != given.get(size)
    if not in_a_step or of_an_mpi or "SLURM_PROCID" not in given:
        return ()
    return ("SLURM_PROCID", size, "SLURM_LOCALID")


def _add(found: dict[str, str], given: Mapping[str, str], names: Mapping[str, str]) -> None:
    """Adds to our own variables what is said in others; what is said twice must agree."""
    for name in _NUMBERS:
        other = names[name]
        if other == name or other not in given:
            continue
        if found.setdefault(name, given[other]) != given[other]:
            raise _refusal(
                f"{name}: {_shown(found[name])} given with {other} {given[other]}; allowed: the same"
            )
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST")
    if names["RANK"] == "SLURM_PROCID" and nodes:
        found.setdefault("MASTER_ADDR", first_host(nodes))
        found.setdefault("MASTER_PORT", str(_port(given.get("SLURM_JOB_ID", ""), given["SLURM_STEP_ID"])))


def _port(job: str, step: str) -> int:
    """The same for all tasks of a step; steps and jobs side by side on a node have others."""
    return _FIRST_PORT + ((_whole(job) or 0) + 1009 * int(step)) % _NUM_PORTS


def _missing(found: Mapping[str, str], missing: list[str], names: Mapping[str, str]) -> str:
    size = names["WORLD_SIZE"]
    if size != "WORLD_SIZE":
        how = " (mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500 ...)" if "MPI" in size else ""
        said = f"{size}: {found['WORLD_SIZE']} processes were started" if "WORLD_SIZE" in found else size
        return f"{said} without {', '.join(missing)}; needed: where rank 0 is to be found{how}"
    first = next(iter(found))
    others = "".join(f", {name}" for name in list(found)[1:])
    return f"{first}{others}: given without {', '.join(missing)}; needed: all of them, or none"


def _number(
    found: Mapping[str, str],
    names: Mapping[str, str],
    name: str,
    least: int,
    most: int = 2**31 - 1,
    because: str = "",
) -> int:
    text = found[name]
    number = _whole(text)
    if number is None or not least <= number <= most:
        allowed = f"a whole number from {least} to {most}{because}"
        raise _refusal(f"{names[name]}: {_shown(text)} given; allowed: {allowed}")
    return number


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,10}", text) else None


def _local_world_size(given: Mapping[str, str], names: Mapping[str, str]) -> int:
    for name in _LOCAL_SIZES:
        if name in given:
            return _number(given, {name: name}, name, 1)
    if names["RANK"] == "SLURM_PROCID":
        # Such as `2(x3),1`; the fullest node has the least room.
        counts = re.sub(r"\(x\d+\)", "", given.get("SLURM_STEP_TASKS_PER_NODE", "")).split(",")
        return max(_whole(count) or 0 for count in counts)
    return 0


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else f"{text[:57]}...", ensure_ascii=False)


def _refusal(line: str) -> ConfigError:
    return ConfigError([f"{line}; {_REMEDY}"], source="environment")
