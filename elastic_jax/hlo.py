"""Reading compiled programs: what their instructions amount to, loops counted as often as they run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.$-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.$-]+) = (.+)$')
_OPCODE = re.compile(r' ([a-z][\w-]*)\(')
_NAME = re.compile(r'%([\w.$-]+)')
_BARE_NAMES = re.compile(r'([\w.$-]+)\s*(?:,|$)')
_SHAPE = re.compile(r'^\w+\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.$-]+)')
_CONDITION = re.compile(r'condition=%?([\w.$-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_INDEX = re.compile(r'index=(\d+)')
_CONSTANT = re.compile(r' constant\((-?\d+)\)')
_CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')
_LABELS = re.compile(r'dim_labels=(\w+)_(\w+)->(\w+)')
_WINDOW = re.compile(r'window=\{([^}]*)\}')

ROOT = 'ROOT'  # The key, in a computation, of its result's name.
Computation = dict[str, str]  # Instruction name -> the text that defines it.
# (instruction, its computation) -> what one run of that instruction alone amounts to.
Measure = Callable[[str, Computation], Counter]


def tally(text: str, measure: Measure, inside_fusions: bool = True) -> Counter:
    """The sum of `measure` over every instruction that a program runs; of a conditional's branches the dearest in each count.

    `text` is optimised HLO, as `compiled.as_text()` or a dump has it. Raises ValueError when a loop that counts has no known
    trip count, or nothing can be read.
    """
    computations, entry = _parse(text)

    @cache
    def total(name: str) -> Counter:
        result: Counter = Counter()
        for key, line in computations[name].items():
            if key != ROOT:
                result.update(measure(line, computations[name]))
                result.update(inner(line, computations[name]))
        return result

    def inner(line: str, own: Computation) -> Counter:
        if (not inside_fusions and opcode(line) == 'fusion') or opcode(line) == 'async-done':
            return Counter()
        branches = _BRANCHES.search(line)
        called = [name.strip().lstrip('%') for name in branches[1].split(',')] if branches else _CALLED.findall(line)
        result: Counter = Counter()
        for name in called:
            result = result | total(name) if opcode(line) == 'conditional' else result + total(name)
        if result and opcode(line) == 'while':
            trips = _trip_count(line, own, computations)
            if trips is None:
                raise ValueError(f'a loop has no known trip count: {line[:120]}')
            result = Counter({key: value * trips for key, value in result.items()})
        return result

    return total(entry)


def matmul_flops(text: str) -> float:
    """FLOPs of all matmuls (and convolutions, as which the TPU compiler writes them) in optimised HLO; see `tally`."""

    def flops(line: str, own: Computation) -> Counter:
        kind = opcode(line)
        return Counter(
            flops=_dot_flops(line, own) if kind == 'dot' else _convolution_flops(line, own) if kind == 'convolution' else 0
        )

    return float(tally(text, flops)['flops'])


def opcode(line: str) -> str:
    """What an instruction does, such as `fusion`."""
    found = _OPCODE.search(line)
    return found[1] if found else ''


def operands(line: str) -> list[str]:
    """Names of the instructions that an instruction reads."""
    start = _OPCODE.search(line).end()
    depth, end = 1, start
    while depth and end < len(line):
        depth += {'(': 1, ')': -1}.get(line[end], 0)
        end += 1
    inside = line[start : end - 1]
    return _NAME.findall(inside) or _BARE_NAMES.findall(inside)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, own = None, {}
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            own = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            own[instruction[2]] = instruction[3]
            if instruction[1]:
                own[ROOT] = instruction[2]
    if entry is None:
        raise ValueError('this text is no HLO module: it has no ENTRY computation')
    return computations, entry


def _trip_count(line: str, own: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: as the compiler wrote it down, or as a counter that goes up to a constant says."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = computations[_CONDITION.search(line)[1]]
    compare = condition[condition[ROOT]]
    if opcode(compare) != 'compare' or 'direction=LT' not in compare:
        return None
    counter, limit = operands(compare)
    index, limit = _INDEX.search(condition[counter]), _constant(limit, condition)
    if index is None or limit is None:
        return None
    start = _constant(operands(own[operands(line)[0]])[int(index[1])], own)
    body = computations[_CALLED.search(line)[1]]
    advance = body[operands(body[body[ROOT]])[int(index[1])]]
    steps = [_constant(name, body) for name in operands(advance)] if opcode(advance) == 'add' else []
    step = next((value for value in steps if value is not None), None)
    return None if start is None or not step else max(0, -(-(limit - start) // step))


def _constant(name: str, own: Computation) -> int | None:
    while opcode(own[name]) in ('copy', 'bitcast'):
        name = operands(own[name])[0]
    found = _CONSTANT.search(own[name])
    return int(found[1]) if found else None


def _dimensions(line: str) -> list[int]:
    return [int(size) for size in _SHAPE.match(line)[1].split(',') if size]


def _dot_flops(line: str, own: Computation) -> float:
    contracted = [int(i) for i in _CONTRACTED.search(line)[1].split(',') if i]
    left = _dimensions(own[operands(line)[0]])
    return 2.0 * math.prod(_dimensions(line)) * math.prod(left[i] for i in contracted)


def _convolution_flops(line: str, own: Computation) -> float:
    """Multiplications with padding and with the holes of dilation are not counted."""
    left, right, out = _LABELS.search(line).groups()
    sizes = [
        dict(zip(labels, shape, strict=True))
        for labels, shape in zip((left, right), map(_dimensions, _own_shapes(line, own)), strict=True)
    ]
    result = dict(zip(out, _dimensions(line), strict=True))
    groups = re.search(r'batch_group_count=(\d+)', line)
    window = dict(part.split('=') for part in _WINDOW.search(line)[1].split()) if _WINDOW.search(line) else {}
    flops = 2.0 * result['b'] * result['f'] * sizes[1]['i'] / (int(groups[1]) if groups else 1)
    for n, label in enumerate(sorted(label for label in out if label.isdigit())):
        value = lambda key, default, n=n: window.get(key, 'x'.join([default] * 9)).split('x')[n]
        low = int(value('pad', '0_0').split('_')[0])
        stride, spread, holes = int(value('stride', '1')), int(value('rhs_dilate', '1')), int(value('lhs_dilate', '1'))
        positions = ((o * stride + k * spread - low) for o in range(result[label]) for k in range(sizes[1][label]))
        flops *= sum(0 <= at < sizes[0][label] * holes and at % holes == 0 for at in positions)
    return flops


def _own_shapes(line: str, own: Computation) -> list[str]:
    return [own[name] for name in operands(line)[:2]]
