"""Repeated units in a stack of layers: what a scan may run over, so that each distinct body is compiled once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Layers start … start + unit · repeats - 1 of a stack: `repeats` times the same `unit` layers."""

    start: int
    unit: int
    repeats: int


def segments(keys: Sequence[Hashable]) -> list[Segment]:
    """The stack cut into segments with the fewest distinct layer bodies in all; of equals, the one with the fewest segments.

    Dynamic programming over the end of the last segment; layers with equal keys are interchangeable.
    """
    best: list[tuple[int, int, Segment | None]] = [(0, 0, None)]
    for end in range(1, len(keys) + 1):
        options = []
        for start in range(end):
            length = end - start
            for unit in range(1, length + 1):
                if length % unit == 0 and all(keys[i] == keys[i + unit] for i in range(start, end - unit)):
                    bodies, parts, _ = best[start]
                    options.append((bodies + unit, parts + 1, Segment(start, unit, length // unit)))
                    break  # the smallest unit has the fewest bodies
        best.append(min(options))
    result, end = [], len(keys)
    while end:
        segment = best[end][2]
        result.append(segment)
        end = segment.start
    return result[::-1]
