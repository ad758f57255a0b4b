"""Several samples in a row: which ones share one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sample first, each into the row that it leaves the least room in.

    How many rows there are depends on the lengths alone.

    Args:
        lengths: of the samples, in tokens, at most `capacity`.
        order: the samples, each once; decides among equals.
        capacity: tokens of a row.

    Returns:
        The samples of each row.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for sample in sorted(order, key=lambda sample: -lengths[sample]):
        length = lengths[sample]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(sample)
        left = room - length
        if left:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(row)
    return rows
