"""Reading compiled programs: how many matmul FLOPs they execute, loops counted as often as they run."""

from __future__ import annotations

import math
import re
from functools import cache

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.$-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.$-]+) = (.+)$')
_SHAPE = re.compile(r'^\w+\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.$-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_DOT = re.compile(r' dot\((?:\w+\[[^\]]*\]\S* )?%?([\w.$-]+)')
_CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')


def matmul_flops(text: str) -> float:
    """FLOPs of all matmuls in optimised HLO (`compiled.as_text()`); of a conditional's branches the dearest counts.

    Raises ValueError when a loop with a matmul in it has no known trip count, or nothing can be read.
    """
    computations, entry = _parse(text)

    @cache
    def total(name: str) -> float:
        return sum(_flops(line, computations[name], total) for line in computations[name].values())

    return total(entry)


def _parse(text: str) -> tuple[dict[str, dict[str, str]], str]:
    computations: dict[str, dict[str, str]] = {}
    entry, own = None, {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            own = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            own[instruction[1]] = instruction[2]
    if entry is None:
        raise ValueError('this text is no HLO module: it has no ENTRY computation')
    return computations, entry


def _flops(line: str, computation: dict[str, str], total: object) -> float:
    if dot := _DOT.search(line):
        contracted = [int(i) for i in _CONTRACTED.search(line)[1].split(',') if i]
        left = _dimensions(computation[dot[1]])
        return 2.0 * math.prod(_dimensions(line)) * math.prod(left[i] for i in contracted)
    if branches := _BRANCHES.search(line):
        return max(total(name.strip().lstrip('%')) for name in branches[1].split(','))
    inner = sum(total(name) for name in _CALLED.findall(line))
    if inner and ' while(' in line:
        trips = _TRIPS.search(line)
        if trips is None:
            raise ValueError(f'a loop with matmuls has no known trip count: {line[:120]}')
        return inner * int(trips[1])
    return inner


def _dimensions(line: str) -> list[int]:
    return [int(size) for size in _SHAPE.match(line)[1].split(',') if size]
