"""What a compiled program sends between devices, and how long its compiler thinks that it computes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

from elastic_jax.errors import WorkError
from elastic_jax.hlo import ROOT, Computation, opcode, operands, tally

RELAYOUTS = ('copy', 'slice')  # what moves arrays and computes nothing
KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')

_SHAPES = re.compile(r'\b(pred|token|opaque|[subf]+f?\d+\w*|c64|c128)\[([\d,]*)\]')
_BITS = re.compile(r'\d+')
_LISTED = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_IOTA = re.compile(r'replica_groups=\[\d+,(\d+)\]')
_MESH = re.compile(
    r'replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}'
)  # since jax 0.12: sizes of all axes, and those exchanged over
_AXIS_SIZES, _AXES = re.compile(r"'([^']*)'=(\d+)"), re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")  # an axis, or a part of one
_DEVICES = re.compile(r'^HloModule.*?num_partitions=(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**62


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind that one device takes part in, in one run of a program.

    Attributes:
      count: how many; an asynchronous one counts once, one in a loop as often as it runs.
      bytes: the sum of their arrays' bytes, each the larger of what goes in and what comes out: a gather's result, the array
        that a reduce-scatter starts from.
      groups: group size -> (count, bytes) of those among that many devices.
    """

    count: int = 0
    bytes: int = 0
    groups: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        groups = {str(size): {'count': count, 'bytes': total} for size, (count, total) in self.groups.items()}
        return {'count': self.count, 'bytes': self.bytes, 'by_group_size': groups}


def collectives(text: str) -> dict[str, Collective]:
    """The collectives in optimised HLO (see `hlo.tally`) by kind; every kind of KINDS is a key."""
    devices = _DEVICES.search(text)
    every = int(devices[1]) if devices else 1
    found = tally(text, lambda line, own: _measure(line, own, every))
    result = {}
    for kind in KINDS:
        sizes = sorted({key[1] for key in found if key[0] == kind})
        groups = {size: (found[kind, size, 'count'], found[kind, size, 'bytes']) for size in sizes}
        result[kind] = Collective(sum(count for count, _ in groups.values()), sum(total for _, total in groups.values()), groups)
    return result


def estimated_cycles(text: str, only: tuple[str, ...] = ()) -> int:
    """The TPU compiler's estimate of the cycles of all fusions; kernels and collectives are not in it. 0 for other targets.

    Of fusions that it has no estimate for it writes the largest integer there is; they count nothing. `only` names
    operations that are counted alone, as RELAYOUTS.
    """

    def measure(line: str, own: Computation) -> Counter:
        cycles = _CYCLES.search(line)
        known = cycles is not None and int(cycles[1]) < _NO_ESTIMATE and (not only or opcode(line) in only)
        return Counter(cycles=int(cycles[1]) if known else 0)

    return tally(text, measure, inside_fusions=False)['cycles']


def _measure(line: str, own: Computation, every: int) -> Counter:
    kind = opcode(line).removesuffix('-start')
    if kind not in KINDS:
        return Counter()
    if kind == 'all-reduce' and _is_scattered(line, own):
        kind = 'reduce-scatter'
    size = 2 if kind == 'collective-permute' else _group_size(line, every)
    given = sum(_bytes(own[name]) for name in operands(line))
    return Counter({(kind, size, 'count'): 1, (kind, size, 'bytes'): given * (size if kind == 'all-gather' else 1)})


def _is_scattered(line: str, own: Computation) -> bool:
    """Whether of an all-reduce's result only this device's part is made: so the TPU compiler writes many reduce-scatters."""
    result = own.get(own.get(ROOT, ''), '')
    if opcode(result) != 'dynamic-slice':
        return False
    source = own[operands(result)[0]]
    while opcode(source) == 'bitcast':
        source = own[operands(source)[0]]
    return source == line


def _group_size(line: str, every: int) -> int:
    if listed := _LISTED.search(line):
        return listed[1].count(',') + 1
    if iota := _IOTA.search(line):
        return int(iota[1])
    if mesh := _MESH.search(line):
        sizes = dict(_AXIS_SIZES.findall(mesh[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in _AXES.findall(mesh[2]))
    if 'replica_groups=' in line.replace('replica_groups={}', ''):
        found = re.search(r'replica_groups=\S*', line)[0]
        raise WorkError(
            f'the compiler writes its groups of devices as {found!r}, which this version cannot read; take an older jax'
        )
    return every


def _bytes(line: str) -> int:
    """Bytes of an instruction's result."""
    found = re.search(r' [a-z][\w-]*\(', line)
    return sum(_array_bytes(*shape) for shape in _SHAPES.findall(line[: found.start()]))


def _array_bytes(dtype: str, dimensions: str) -> int:
    bits = {'pred': 8, 'token': 0, 'opaque': 0}.get(dtype)
    bits = int(_BITS.search(dtype)[0]) if bits is None else bits
    return -(-math.prod(int(size) for size in dimensions.split(',') if size) * bits // 8)
