from __future__ import annotations

import random
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from ssmlora_dist.distributed.schedule import (
    Instruction,
    OperationKind,
    Recompute,
    StageTimes,
    StepTimeline,
    instructions,
    micro_batches_in_flight,
    simulate,
)

SEED = 20250307
SIZES = [(p, m) for p in range(1, 7) for m in (1, 2, 3, 5, 8, 13)]
TRANSFERS = {
    OperationKind.SEND_ACTIVATION: (1, OperationKind.RECV_ACTIVATION),
    OperationKind.SEND_GRADIENT: (-1, OperationKind.RECV_GRADIENT),
}
BY_DEEPSPEED_NAME = {
    "ForwardPass": OperationKind.FORWARD,
    "BackwardPass": OperationKind.BACKWARD,
    "SendActivation": OperationKind.SEND_ACTIVATION,
    "RecvActivation": OperationKind.RECV_ACTIVATION,
    "SendGrad": OperationKind.SEND_GRADIENT,
    "RecvGrad": OperationKind.RECV_GRADIENT,
}
# Loading from the data set and the end of the step, which are outside of what is simulated.
UNTIMED = {"LoadMicroBatch", "ReduceTiedGrads", "ReduceGrads", "OptimizerStep"}


@cache
def deepspeed_program(stage: int, num_stages: int, num_micro_batches: int) -> tuple[tuple[Any, int], ...]:
    """Kinds and buffers of DeepSpeed's own training schedule."""
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    schedule = TrainSchedule(num_micro_batches, num_stages, stage)
    commands = [command for step in schedule.steps() for command in step]
    assert {command.name for command in commands} <= UNTIMED | BY_DEEPSPEED_NAME.keys()
    timed = [command for command in commands if command.name not in UNTIMED]
    return tuple((BY_DEEPSPEED_NAME[command.name], command.buffer_id) for command in timed)


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_the_order_is_deepspeeds(num_stages: int) -> None:
    for num_micro_batches in range(1, 14):
        for stage in range(num_stages):
            buffers = max(2, micro_batches_in_flight(stage, num_stages, num_micro_batches))
            ours = tuple(
                (kind, micro_batch % buffers)
                for kind, micro_batch in instructions(stage, num_stages, num_micro_batches)
            )
            assert ours == deepspeed_program(stage, num_stages, num_micro_batches), (
                stage,
                num_micro_batches,
            )


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_the_recompute_comes_before_the_wait_or_before_the_backward_pass(
    num_stages: int, num_micro_batches: int
) -> None:
    for stage in range(num_stages):
        plain = instructions(stage, num_stages, num_micro_batches)
        for mode, following in (
            ("on_gradient", OperationKind.BACKWARD),
            ("while_waiting", OperationKind.RECV_GRADIENT),
        ):
            expected = []
            for instruction in plain:
                if instruction.kind == following:
                    expected.append(Instruction(OperationKind.RECOMPUTE, instruction.micro_batch))
                expected.append(instruction)
            assert instructions(stage, num_stages, num_micro_batches, mode) == tuple(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_equal_stages_take_m_plus_p_minus_1_turns(num_stages: int, num_micro_batches: int) -> None:
    p, m = num_stages, num_micro_batches
    kept = simulate([StageTimes(3, 5)] * p, m)
    again = simulate([StageTimes(3, 5, 2)] * p, m, "on_gradient")
    assert kept.total_seconds == (m + p - 1) * (3 + 5)
    assert again.total_seconds == (m + p - 1) * (3 + 2 + 5)
    for step, turn in ((kept, 3 + 5), (again, 3 + 2 + 5)):
        assert {stage.busy_seconds for stage in step.stages} == {m * turn}
        assert {stage.idle_seconds for stage in step.stages} == {(p - 1) * turn}
        assert step.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_recompute_while_waiting_leaves_a_bubble_of_p_minus_1_forward_and_backward_passes(
    num_stages: int, num_micro_batches: int
) -> None:
    """Where the last stage does as much in a turn without its recompute as the others do with theirs."""
    p, m = num_stages, num_micro_batches
    for last in (StageTimes(5, 5, 2), StageTimes(3, 7, 2)):
        step = simulate([StageTimes(3, 5, 2)] * (p - 1) + [last], m, "while_waiting")
        assert step.total_seconds == m * (3 + 2 + 5) + (p - 1) * (3 + 5)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), SIZES)
def test_recompute_while_waiting_with_equal_layers(num_stages: int, num_micro_batches: int) -> None:
    """The last stage then has less to do, and all wait less; F = R < B."""
    p, m, forward, backward = num_stages, num_micro_batches, 3, 5
    step = simulate([StageTimes(forward, backward, forward)] * p, m, "while_waiting")
    if p == 1:
        assert step.total_seconds == m * (forward + backward)
    else:
        spared = forward if m == 1 else 2 * forward
        expected = m * (2 * forward + backward) + (p - 1) * (forward + backward) - spared
        assert step.total_seconds == expected
    assert step.stages[-1].busy_seconds == m * (forward + backward)


def test_transfers_by_hand() -> None:
    """Two stages, three micro-batches: F 1, B 2; activations take 10, gradients 100.

    Stage 0: F0 to 1, sends 1-11, F1 to 12, waits for the gradient 14-114, sends 114-124, B0 to 126, ...
    Stage 1: receives 1-11, F0 to 12, B0 to 14, sends the gradient 14-114, receives 114-124, F1 to 125, ...
    """
    step = simulate([StageTimes(1, 2, 0, 10, 100)] * 2, 3)
    first = [operation[1:] for operation in step.operations if operation.stage == 0]
    assert first == [
        (OperationKind.FORWARD, 0, 0, 1),
        (OperationKind.SEND_ACTIVATION, 0, 1, 11),
        (OperationKind.FORWARD, 1, 11, 12),
        (OperationKind.RECV_GRADIENT, 0, 14, 114),
        (OperationKind.SEND_ACTIVATION, 1, 114, 124),
        (OperationKind.BACKWARD, 0, 124, 126),
        (OperationKind.FORWARD, 2, 126, 127),
        (OperationKind.RECV_GRADIENT, 1, 127, 227),
        (OperationKind.SEND_ACTIVATION, 2, 227, 237),
        (OperationKind.BACKWARD, 1, 237, 239),
        (OperationKind.RECV_GRADIENT, 2, 240, 340),
        (OperationKind.BACKWARD, 2, 340, 342),
    ]
    assert step.total_seconds == 342
    assert [stage.transfer_seconds for stage in step.stages] == [330, 330]
    assert [stage.idle_seconds for stage in step.stages] == [342 - 330 - 9] * 2


def random_stages(source: random.Random) -> list[StageTimes]:
    """One to five stages of whole seconds, so that sums are exact in any order."""
    return [
        StageTimes(*(source.randint(1, 9) for _ in range(3)), *(source.randint(0, 4) for _ in range(2)))
        for _ in range(source.randint(1, 5))
    ]


def longest_path(stages: list[StageTimes], num_micro_batches: int, recompute: Recompute) -> float:
    """The step's length by recursion over what each of DeepSpeed's instructions waits for."""
    programs: list[list[tuple[str, int]]] = []
    for stage in range(len(stages)):
        program: list[tuple[str, int]] = []
        for kind, _ in deepspeed_program(stage, len(stages), num_micro_batches):
            number = sum(1 for earlier, _ in program if earlier == kind)
            wanted = {"on_gradient": OperationKind.BACKWARD, "while_waiting": OperationKind.RECV_GRADIENT}
            if kind == wanted.get(recompute):
                program.append((OperationKind.RECOMPUTE, number))
            program.append((kind, number))
        programs.append(program)

    def other_side(stage: int, instruction: tuple[str, int]) -> tuple[int, tuple[str, int]] | None:
        kind, number = instruction
        for sending, (step, receiving) in TRANSFERS.items():
            if kind == sending:
                return stage + step, (receiving, number)
            if kind == receiving:
                return stage - step, (sending, number)
        return None

    @cache
    def begins(stage: int, position: int) -> float:
        return ends(stage, position - 1) if position else 0.0

    @cache
    def ends(stage: int, position: int) -> float:
        instruction = programs[stage][position]
        start, seconds = begins(stage, position), stages[stage].seconds(OperationKind(instruction[0]))
        if other := other_side(stage, instruction):
            place, counterpart = other
            start = max(start, begins(place, programs[place].index(counterpart)))
            seconds += stages[place].seconds(OperationKind(counterpart[0]))
        return start + seconds

    return max(ends(stage, len(program) - 1) for stage, program in enumerate(programs))


@pytest.mark.parametrize("recompute", ["none", "on_gradient", "while_waiting"])
def test_any_times_against_the_longest_path(recompute: Recompute) -> None:
    print(f"seed {SEED}")
    source = random.Random(SEED)
    for _ in range(100):
        stages, num_micro_batches = random_stages(source), source.randint(1, 6)
        step = simulate(stages, num_micro_batches, recompute)
        assert step.total_seconds == longest_path(stages, num_micro_batches, recompute), stages
        check_timeline(step, stages, num_micro_batches)


def test_recompute_while_waiting_never_costs_time() -> None:
    print(f"seed {SEED}")
    source = random.Random(SEED)
    for _ in range(200):
        stages, num_micro_batches = random_stages(source), source.randint(1, 6)
        later = simulate(stages, num_micro_batches, "on_gradient").total_seconds
        assert simulate(stages, num_micro_batches, "while_waiting").total_seconds <= later, stages


def check_timeline(step: StepTimeline, stages: list[StageTimes], num_micro_batches: int) -> None:
    """Nothing overlaps at a stage, all time is accounted for, and 1F1B's bound on memory holds exactly."""
    assert max(operation.end_seconds for operation in step.operations) == step.total_seconds
    for stage, use in enumerate(step.stages):
        timeline = [operation for operation in step.operations if operation.stage == stage]
        for operation, following in pairwise(timeline):
            assert operation.end_seconds <= following.start_seconds
        assert use.busy_seconds + use.transfer_seconds + use.idle_seconds == step.total_seconds
        assert use.idle_seconds >= 0
        assert use.peak_micro_batches == micro_batches_in_flight(stage, len(stages), num_micro_batches)
        computed = sum(stages[stage].seconds(op.kind) for op in timeline if op.kind not in TRANSFERS)
        assert use.busy_seconds == computed
    busy = sum(Fraction(use.busy_seconds) for use in step.stages)
    bubble = 1 - busy / (len(stages) * Fraction(step.total_seconds))
    assert step.bubble_fraction == pytest.approx(float(bubble), abs=1e-12)


def test_a_step_without_time_has_no_bubble() -> None:
    assert simulate([StageTimes(0, 0)] * 3, 2).bubble_fraction == 0
