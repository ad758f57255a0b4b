"""Who a process is among its run's processes, by what launchers and schedulers leave in the environment."""

from __future__ import annotations

import pytest

from ssmlora_dist.errors import ConfigError
from ssmlora_dist.ranks import LaunchEnvironment, first_host, read_launch_environment

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "812345",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "node[03-05,9]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
ALONE = LaunchEnvironment()


def refused(environment: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_launch_environment(environment)
    [line] = caught.value.problems
    return line


def test_without_a_launcher_a_process_is_alone() -> None:
    assert read_launch_environment({}) == ALONE
    assert (ALONE.rank, ALONE.world_size, ALONE.local_rank, ALONE.address) == (0, 1, 0, None)
    assert read_launch_environment(dict.fromkeys(TORCH, "")) == ALONE


def test_a_launcher_s_variables() -> None:
    assert read_launch_environment(TORCH) == LaunchEnvironment(3, 4, 1, "node7", 29500)
    # One launcher for each node under srun: whatever Slurm says, the launcher made the ranks.
    assert read_launch_environment(
        TORCH | SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    ) == read_launch_environment(TORCH)


@pytest.mark.parametrize("missing", TORCH)
def test_all_of_them_or_none(missing: str) -> None:
    line = refused({name: value for name, value in TORCH.items() if name != missing})
    assert f"without {missing};" in line
    assert all(name in line for name in TORCH)
    assert "unset" in line
    line = refused({missing: TORCH[missing]})
    assert line.startswith(f"{missing}: ")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"WORLD_SIZE": "two"}, ('WORLD_SIZE: "two" given', "a whole number from 1")),
        ({"WORLD_SIZE": "0"}, ('WORLD_SIZE: "0" given', "a whole number from 1")),
        ({"RANK": "-1"}, ('RANK: "-1" given', "a whole number from 0")),
        ({"RANK": "1.0"}, ('RANK: "1.0" given',)),
        ({"RANK": "²"}, ('RANK: "²" given',)),
        ({"LOCAL_RANK": "x"}, ('LOCAL_RANK: "x" given',)),
        ({"RANK": "4"}, ('RANK: "4" given', "below WORLD_SIZE 4")),
        ({"LOCAL_RANK": "4"}, ('LOCAL_RANK: "4" given', "below WORLD_SIZE 4")),
        ({"MASTER_PORT": "ssh"}, ('MASTER_PORT: "ssh" given', "from 1 to 65535")),
        ({"MASTER_PORT": "0"}, ('MASTER_PORT: "0" given', "from 1 to 65535")),
        ({"MASTER_PORT": "65536"}, ('MASTER_PORT: "65536" given', "from 1 to 65535")),
        ({"RANK": "9" * 5000}, ("RANK:", "below WORLD_SIZE 4")),
        ({"LOCAL_WORLD_SIZE": "x"}, ('LOCAL_WORLD_SIZE: "x" given',)),
    ],
)
def test_what_is_no_number_or_no_rank_is_refused(changes: dict[str, str], fragments: tuple[str, ...]) -> None:
    line = refused(TORCH | changes)
    assert all(fragment in line for fragment in fragments), line
    assert "unset" in line


def test_ranks_of_a_node() -> None:
    assert read_launch_environment(TORCH | {"LOCAL_WORLD_SIZE": "2"}).local_world_size == 2
    assert read_launch_environment(TORCH | {"LOCAL_SIZE": "2"}).local_world_size == 2
    assert read_launch_environment(TORCH).local_world_size == 4
    assert read_launch_environment(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}).local_world_size == 2


def test_srun_makes_ranks() -> None:
    environment = read_launch_environment(SLURM)
    assert environment == LaunchEnvironment(3, 4, 1, "node03", environment.port)
    # The same for all tasks of a step, another one for another step or job.
    assert (
        read_launch_environment(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port == environment.port
    )
    assert read_launch_environment(SLURM | {"SLURM_STEP_ID": "3"}).port != environment.port
    assert read_launch_environment(SLURM | {"SLURM_JOB_ID": "812346"}).port != environment.port
    assert all(
        1024 < (read_launch_environment(SLURM | {"SLURM_JOB_ID": str(job)}).port or 0) < 32768
        for job in range(99)
    )
    # The step's own nodes and tasks, where it is a part of the job.
    part = {"SLURM_STEP_NODELIST": "node05", "SLURM_STEP_NUM_TASKS": "8"}
    assert read_launch_environment(SLURM | part) == LaunchEnvironment(3, 8, 1, "node05", environment.port)


def test_what_a_batch_script_exports_for_its_steps_counts() -> None:
    meeting = {"MASTER_ADDR": "head", "MASTER_PORT": "29400"}
    assert read_launch_environment(SLURM | meeting) == LaunchEnvironment(3, 4, 1, "head", 29400)
    assert read_launch_environment(SLURM | meeting | {"WORLD_SIZE": "4"}) == LaunchEnvironment(
        3, 4, 1, "head", 29400
    )
    single = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert read_launch_environment(SLURM | meeting | single) == LaunchEnvironment(0, 1, 0, "head", 29400)
    line = refused(SLURM | meeting | {"WORLD_SIZE": "2"})
    assert 'WORLD_SIZE: "2" given' in line
    assert "SLURM_NTASKS" in line
    assert "4" in line


@pytest.mark.parametrize(
    "changes",
    [
        # A batch script itself, with and without its special step; an interactive shell of an allocation.
        {"SLURM_STEP_ID": "", "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": "batch", "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": "interactive", "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": "", "SLURM_PROCID": ""},
        {"SLURM_PROCID": ""},
        # `srun --pty bash`, and a step of one task.
        {"SLURM_PTY_PORT": "40000", "SLURM_PROCID": "0"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_within_an_allocation_a_process_is_alone(changes: dict[str, str]) -> None:
    assert read_launch_environment(SLURM | changes) == ALONE


def test_slurm_s_variables_are_checked_too() -> None:
    assert 'SLURM_NTASKS: "x" given' in refused(SLURM | {"SLURM_NTASKS": "x"})
    assert 'SLURM_PROCID: "4" given' in refused(SLURM | {"SLURM_PROCID": "4"})
    nowhere = {name: value for name, value in SLURM.items() if name != "SLURM_JOB_NODELIST"}
    assert "without MASTER_ADDR" in refused(nowhere)


def test_mpirun_makes_ranks_that_must_be_told_where_to_meet() -> None:
    line = refused(OPEN_MPI)
    assert line.startswith("OMPI_COMM_WORLD_SIZE: ")
    assert "MASTER_ADDR" in line
    assert "mpirun -x" in line
    assert read_launch_environment(
        OPEN_MPI | {"MASTER_ADDR": "a", "MASTER_PORT": "5000"}
    ) == LaunchEnvironment(1, 2, 1, "a", 5000)
    # In an allocation mpirun starts its own daemons by srun: their numbers are not the ranks'.
    daemons = SLURM | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    assert refused(OPEN_MPI | daemons).startswith("OMPI_COMM_WORLD_SIZE: ")
    assert (
        read_launch_environment(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"})
        == ALONE
    )


def test_other_mpis() -> None:
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}
    assert refused(hydra).startswith("PMI_SIZE: ")
    assert read_launch_environment(hydra | {"MASTER_ADDR": "a", "MASTER_PORT": "5000"}) == LaunchEnvironment(
        1, 2, 1, "a", 5000
    )
    # srun --mpi=pmi2 sets them beside its own.
    assert read_launch_environment(SLURM | {"PMI_RANK": "3", "PMI_SIZE": "4"}) == read_launch_environment(
        SLURM
    )


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,9]", "node03"),
        ("node[9,03-05]", "node9"),
        ("gpu-a[001-128],gpu-b7", "gpu-a001"),
        ("rack[2-3]n[10-12,14]", "rack2n10"),
        ("n[1-2]-ib,other", "n1-ib"),
        ("login.cluster.org,x[1-2]", "login.cluster.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
