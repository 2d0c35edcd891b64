"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from elastic_jax.hlo_cost import KINDS
from elastic_jax.plan.chips import GIB
from elastic_jax.plan.planner import Planned, Row

PARTS = ('parameters', 'optimizer', 'teacher', 'cache', 'batch', 'activations', 'temporary', 'other')


def show(planned: Planned) -> str:
    """Memory, work, collectives, and what to change, each as a table or a list."""
    capacity = planned.topology.hbm_bytes / GIB
    mesh = ' × '.join(f'{axis}={size}' for axis, size in planned.mesh.items() if size > 1) or 'one device'
    done = [row for row in planned.rows if row.compiled is not None]
    lines = [f'{planned.topology.name}: {len(planned.topology.devices)} devices of {capacity:g} GiB, {mesh}', '']
    if done:
        lines += [f'GiB per chip, of {capacity:g}', *_memory(done), '', 'per chip and step', *_work(done), '']
        lines += ['collectives per chip and step: how many, GB', *_collectives(done), '']
    if planned.misaligned:
        lines += ['widths that are no whole tiles, and what computing them as whole ones costs', *_misaligned(planned), '']
    lines += [f'{row.name}: {row.problem}' for row in planned.rows if row.problem]
    lines.append('fits' if planned.fits else 'does not fit')
    return '\n'.join([*lines, *(f'  {change}' for change in planned.changes)])


def _memory(rows: list[Row]) -> Iterator[str]:
    parts = [part for part in PARTS if any(part in row.compiled.memory for row in rows)]
    cells = lambda row: [f'{row.compiled.memory[part] / GIB:.2f}' if part in row.compiled.memory else '' for part in parts]
    body = [[row.name, *cells(row), f'{row.compiled.total / GIB:.2f}', 'yes' if row.compiled.fits else 'NO'] for row in rows]
    return aligned([['program', *parts, 'total', 'fits'], *body])


def _work(rows: list[Row]) -> Iterator[str]:
    body = [['program', 'TFLOP needed', 'TFLOP compiled', 'Mcycles outside kernels', 'of relayouts', 'compile s']]
    for row in rows:
        one = row.compiled
        compiled = '' if one.matmul_flops is None else f'{one.matmul_flops / 1e12:.3g}'
        cycles = ['' if own is None else f'{own / 1e6:.4g}' for own in (one.cycles, one.relayout_cycles)]
        body.append([row.name, f'{row.flops / 1e12:.3g}', compiled, *cycles, f'{one.compile_seconds:.0f}'])
    return aligned(body)


def _collectives(rows: list[Row]) -> Iterator[str]:
    body = [['program', *KINDS]]
    for row in rows:
        found = row.compiled.collectives
        body.append([row.name, *('' if found is None else _amount(found[kind].count, found[kind].bytes) for kind in KINDS)])
    return aligned(body)


def _misaligned(planned: Planned) -> Iterator[str]:
    body = [[one.budget, one.axis, str(one.width), str(one.aligned), f'+{one.extra_flops:.1%}'] for one in planned.misaligned]
    return aligned([['budget', 'axis', 'width', 'whole tiles', 'FLOPs'], *body])


def _amount(count: int, size: int) -> str:
    return f'{count}, {size / 1e9:.3g}' if count else '-'


def aligned(table: list[list[str]]) -> Iterator[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield '  '.join(
            cell.ljust(width) if n == 0 else cell.rjust(width) for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
