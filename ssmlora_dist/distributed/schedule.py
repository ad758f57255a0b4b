"""The 1F1B pipeline schedule, simulated: how long a step takes and what each stage does in it.

Pure functions of numbers. Time is parted into slots, alternately of a forward and of a backward pass at each
stage: stage s of p runs the forward pass of micro-batch k in slot s + 2k and its backward pass in slot
2p - 1 - s + 2k. In every slot gradients travel first, then activations, then the stage computes. What is in a
slot fixes the order of a stage's instructions and nothing else: a stage begins each as soon as it can.

Sends and receives block: a transfer begins when both stages have come to it and holds up both until it ends.
That is how gloo moves every tensor, and NCCL those larger than its buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

Recompute = Literal["none", "on_gradient", "while_waiting"]
"""When activations are recomputed: never, for all are kept; layer by layer once the gradient has arrived; or
before the stage waits for the gradient, and then not at all on the last stage, which does not wait."""


class OperationKind(StrEnum):
    """What a stage can be doing."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"
    SEND_ACTIVATION = "send_activation"
    RECV_ACTIVATION = "recv_activation"
    SEND_GRADIENT = "send_gradient"
    RECV_GRADIENT = "recv_gradient"


class Instruction(NamedTuple):
    """One entry of a stage's program."""

    kind: OperationKind
    micro_batch: int


@dataclass(frozen=True)
class StageTimes:
    """What one micro-batch costs at one stage.

    Attributes:
        forward_seconds: F.
        backward_seconds: B, the recompute aside.
        recompute_seconds: R. Layers that are recomputed on the gradient's arrival although the others are
            recomputed while waiting count in `backward_seconds`.
        activation_seconds: to send the activations to the next stage.
        gradient_seconds: to send the gradient to the previous stage.
    """

    forward_seconds: float
    backward_seconds: float
    recompute_seconds: float = 0.0
    activation_seconds: float = 0.0
    gradient_seconds: float = 0.0

    def seconds(self, kind: OperationKind) -> float:
        """How long an operation takes; 0 for receiving, whose time is the sender's."""
        return {
            OperationKind.FORWARD: self.forward_seconds,
            OperationKind.RECOMPUTE: self.recompute_seconds,
            OperationKind.BACKWARD: self.backward_seconds,
            OperationKind.SEND_ACTIVATION: self.activation_seconds,
            OperationKind.SEND_GRADIENT: self.gradient_seconds,
        }.get(kind, 0.0)


class Operation(NamedTuple):
    """One executed instruction; a transfer is in the timeline of both of its stages."""

    stage: int
    kind: OperationKind
    micro_batch: int
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class StageUse:
    """What a stage did with the step.

    Attributes:
        busy_seconds: computing.
        transfer_seconds: sending and receiving, the wait for the other side aside.
        idle_seconds: the rest.
        peak_micro_batches: micro-batches at most between the start of their forward and the end of their
            backward pass. Each keeps its activations or, where they are recomputed, what they are recomputed
            from; recomputed activations exist of one micro-batch at a time.
    """

    busy_seconds: float
    transfer_seconds: float
    idle_seconds: float
    peak_micro_batches: int


@dataclass(frozen=True)
class StepTimeline:
    """One simulated step, the optimiser's part aside.

    Attributes:
        total_seconds: from the first operation's start to the last one's end.
        stages: use by stage.
        operations: of all stages, by stage and then by time.
    """

    total_seconds: float
    stages: tuple[StageUse, ...]
    operations: tuple[Operation, ...]

    @property
    def bubble_fraction(self) -> float:
        """Share of all stages' time in which they do not compute; 0 for a step that takes no time."""
        available = len(self.stages) * self.total_seconds
        return 1.0 - sum(stage.busy_seconds for stage in self.stages) / available if available else 0.0


def instructions(
    stage: int, num_stages: int, num_micro_batches: int, recompute: Recompute = "none"
) -> tuple[Instruction, ...]:
    """The program of one stage: the order of DeepSpeed's training schedule, with the recompute in its place.

    Args:
        stage: counted from 0.
        num_stages: p.
        num_micro_batches: m, per step and pipeline.
        recompute: when activations are recomputed.
    """
    assert 0 <= stage < num_stages, f"stage {stage} of {num_stages}"
    assert num_micro_batches >= 1, f"{num_micro_batches} micro-batches"
    is_first, is_last = stage == 0, stage == num_stages - 1
    # A slot's instructions in their order: a stage that waits for a gradient recomputes first, and its
    # activations leave behind the gradient, as the next stage sends its gradient before it receives them.
    ahead, gradient, activation, late, compute = range(5)
    placed: list[tuple[int, int, Instruction]] = []

    def place(slot: int, order: int, kind: OperationKind, micro_batch: int) -> None:
        placed.append((slot, order, Instruction(kind, micro_batch)))

    for k in range(num_micro_batches):
        forward, backward = stage + 2 * k, 2 * num_stages - 1 - stage + 2 * k
        place(forward, compute, OperationKind.FORWARD, k)
        place(backward, compute, OperationKind.BACKWARD, k)
        if not is_first:
            place(forward, activation, OperationKind.RECV_ACTIVATION, k)
            place(backward + 1, gradient, OperationKind.SEND_GRADIENT, k)
        if not is_last:
            place(forward + 1, activation, OperationKind.SEND_ACTIVATION, k)
            place(backward, gradient, OperationKind.RECV_GRADIENT, k)
        if recompute == "on_gradient":
            place(backward, late, OperationKind.RECOMPUTE, k)
        elif recompute == "while_waiting" and not is_last:
            place(backward, ahead, OperationKind.RECOMPUTE, k)
    return tuple(instruction for _, _, instruction in sorted(placed, key=lambda entry: entry[:2]))


def micro_batches_in_flight(stage: int, num_stages: int, num_micro_batches: int) -> int:
    """Micro-batches of which a stage keeps activations at most: how far its forward passes are ahead."""
    return min(num_stages - stage, num_micro_batches)


def simulate(
    stages: Sequence[StageTimes], num_micro_batches: int, recompute: Recompute = "none"
) -> StepTimeline:
    """Runs one step.

    Args:
        stages: the times of each stage.
        num_micro_batches: m, per step and pipeline.
        recompute: when activations are recomputed.
    """
    num_stages = len(stages)
    programs = [instructions(stage, num_stages, num_micro_batches, recompute) for stage in range(num_stages)]
    run = _Run(stages, programs)
    # Which stage is tried first changes nothing: every instruction waits for given others, whoever else runs.
    while any(run.advance(stage) for stage in range(num_stages)):
        pass
    assert not any(map(run.remaining, range(num_stages))), "the programs block each other"
    total = max(run.clocks)
    operations = tuple(operation for timeline in run.timelines for operation in timeline)
    return StepTimeline(total, tuple(_use(timeline, total) for timeline in run.timelines), operations)


_COUNTERPART = {
    OperationKind.SEND_ACTIVATION: (1, OperationKind.RECV_ACTIVATION),
    OperationKind.RECV_ACTIVATION: (-1, OperationKind.SEND_ACTIVATION),
    OperationKind.SEND_GRADIENT: (-1, OperationKind.RECV_GRADIENT),
    OperationKind.RECV_GRADIENT: (1, OperationKind.SEND_GRADIENT),
}


class _Run:
    """Clocks, positions and timelines of all stages in the midst of a step."""

    def __init__(self, stages: Sequence[StageTimes], programs: Sequence[Sequence[Instruction]]) -> None:
        self.stages, self.programs = stages, programs
        self.clocks = [0.0] * len(stages)
        self.timelines: list[list[Operation]] = [[] for _ in stages]

    def remaining(self, stage: int) -> int:
        return len(self.programs[stage]) - len(self.timelines[stage])

    def advance(self, stage: int) -> bool:
        """Executes what it can of one stage's program; whether that was anything."""
        before = self.remaining(stage)
        while self.remaining(stage):
            instruction = self.programs[stage][len(self.timelines[stage])]
            if instruction.kind not in _COUNTERPART:
                seconds = self.stages[stage].seconds(instruction.kind)
                self._execute(stage, instruction, self.clocks[stage], seconds)
            elif not self._transfer(stage, instruction):
                break
        return self.remaining(stage) < before

    def _transfer(self, stage: int, instruction: Instruction) -> bool:
        """Executes a transfer on both sides if the other stage has come to it too."""
        step, kind = _COUNTERPART[instruction.kind]
        other, counterpart = stage + step, Instruction(kind, instruction.micro_batch)
        program, position = self.programs[other], len(self.timelines[other])
        if position == len(program) or program[position] != counterpart:
            return False
        start = max(self.clocks[stage], self.clocks[other])
        seconds = self.stages[stage].seconds(instruction.kind) + self.stages[other].seconds(kind)
        self._execute(stage, instruction, start, seconds)
        self._execute(other, counterpart, start, seconds)
        return True

    def _execute(self, stage: int, instruction: Instruction, start: float, seconds: float) -> None:
        self.clocks[stage] = start + seconds
        self.timelines[stage].append(Operation(stage, *instruction, start, start + seconds))


def _use(timeline: Sequence[Operation], total_seconds: float) -> StageUse:
    busy = transfer = 0.0
    alive = peak = 0
    for operation in timeline:
        if operation.kind in _COUNTERPART:
            transfer += operation.end_seconds - operation.start_seconds
        else:
            busy += operation.end_seconds - operation.start_seconds
        alive += operation.kind == OperationKind.FORWARD
        peak = max(peak, alive)
        alive -= operation.kind == OperationKind.BACKWARD
    return StageUse(busy, transfer, total_seconds - busy - transfer, peak)
