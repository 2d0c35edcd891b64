"""The table at the end of a run: every budget's size and quality, before and after elastic training, beside the parent."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_jax.arch import Arch
from elastic_jax.cost import cost_of
from elastic_jax.model.params import layer_name, param_table

Score = Mapping[str, float]
Row = dict[str, Any]
TABLE_HEAD = ('budget', 'parameters', 'of parent', 'active', 'bf16', 'FLOPs/token', 'bits/byte', 'before', 'gap closed')


def summary_rows(
    archs: Mapping[str, Arch],
    parent: Arch,
    after: Mapping[str, Score],
    before: Mapping[str, Score],
    parent_score: Score,
    context: int,
) -> tuple[list[Row], Row]:
    """(a row for each budget, the parent's row), as plain JSON values.

    Args:
      after, before: held-out scores of each budget's slice with elastic training and without it.
    """
    whole = parent_score['bits_per_byte']
    rows = []
    for name, arch in archs.items():
        old, new = before[name]['bits_per_byte'], after[name]['bits_per_byte']
        scores = {'bits_per_byte': new, 'before_bits_per_byte': old, 'gap_closed': gap_closed(old, new, whole)}
        rows.append(_row(name, arch, context) | scores)
    return rows, _row('parent', parent, context) | {'bits_per_byte': whole}


def _row(name: str, arch: Arch, context: int) -> Row:
    cost = cost_of(arch, context)
    return {
        'name': name,
        'widths': arch.widths(),
        'layers': _layer_widths(arch),
        'parameters': cost.parameters,
        'active_parameters': cost.active_parameters,
        'bytes': cost.bytes,
        'flops_per_token': cost.flops_per_token,
    }


def _layer_widths(arch: Arch) -> list[dict[str, Any]]:
    """Every block, for pictures: [{'mixer': letter, 'parameters': count, axis: width, …}, …]; a dropped block has '.' and 0."""
    table = param_table(arch)
    blocks: list[dict[str, Any]] = []
    for i, letter in enumerate(arch.pattern):
        count = sum(math.prod(param.shape) for param in table.get(layer_name(i), {}).values())
        blocks.append({'mixer': letter, 'parameters': count})
    for axis in arch.axes():
        for i, width in arch.layer_widths(axis.name).items():
            blocks[i][axis.name] = width
    return blocks


def gap_closed(before: float, after: float, parent: float) -> float | None:
    """Share of a slice's gap to the parent that elastic training closed; None where there was none."""
    gap = before - parent
    return (before - after) / gap if gap > 1e-6 and math.isfinite(gap) and math.isfinite(after) else None


def format_table(rows: Sequence[Row], parent: Row) -> str:
    """The table for a terminal, and below it the widths of every budget as `--widths` takes them."""
    lines = [TABLE_HEAD, *(table_cells(row, parent) for row in [*rows, parent])]
    sizes = [max(len(line[column]) for line in lines) for column in range(len(TABLE_HEAD))]
    aligned = []
    for line in lines:
        first, *rest = (cell.rjust(size) for cell, size in zip(line, sizes, strict=True))
        aligned.append('  '.join([first.strip().ljust(sizes[0]), *rest]).rstrip())
    rule = '  '.join('-' * size for size in sizes).rstrip()
    return '\n'.join([aligned[0], rule, *aligned[1:], '', width_lines({row['name']: row['widths'] for row in rows}, sizes[0])])


def table_cells(row: Row, parent: Row) -> tuple[str, ...]:
    """One row of the table as text: name, parameters, their share of the parent's, active parameters, bytes of the weights,
    FLOPs per token, bits per byte, the same before elastic training, share of the gap closed."""
    closed = row.get('gap_closed')
    return (
        row['name'],
        human(row['parameters']),
        percent(row['parameters'] / parent['parameters']),
        human(row['active_parameters']),
        human(row['bytes'], 'B'),
        human(row['flops_per_token']),
        f'{float(row["bits_per_byte"]):.4f}',
        f'{float(row["before_bits_per_byte"]):.4f}' if 'before_bits_per_byte' in row else '',
        percent(closed) if closed is not None else '',
    )


def format_widths(widths: Mapping[str, int]) -> str:
    """Widths as `--widths` takes them."""
    return ','.join(f'{name}={width}' for name, width in widths.items())


def width_lines(widths: Mapping[str, Mapping[str, int]], indent: int, columns: int = 80) -> str:
    """A line for each budget: its name, padded to `indent`, and its widths, which go on below themselves beyond `columns`."""
    blank = ' ' * (indent + 2)
    fill = lambda name, text: textwrap.fill(
        text.replace(',', ', '), columns, initial_indent=name.ljust(indent + 2), subsequent_indent=blank, break_long_words=False
    )
    return '\n'.join(fill(name, format_widths(own)).replace(', ', ',') for name, own in widths.items())


def human(value: float, unit: str = '') -> str:
    """A count in thousands, millions, …, to three digits: 1.02M, 3.9 MB."""
    prefixes = ('', 'k', 'M', 'G' if unit else 'B', 'T', 'P')
    step = 0
    # 999.5 is where three digits round up to the next prefix.
    while abs(value) >= 999.5 and step < len(prefixes) - 1:
        value, step = value / 1000, step + 1
    digits = f'{value:.3g}' if abs(value) < 999.5 else f'{value:.0f}'
    return f'{digits} {prefixes[step]}{unit}' if unit else f'{digits}{prefixes[step]}'


def percent(share: float, digits: int = 0) -> str:
    """0.55 -> '55 %'."""
    return f'{100 * share:.{digits}f} %'


def duration(seconds: float) -> str:
    """'1h05m', '3m20s'; '?' for not a number."""
    if seconds != seconds:
        return '?'
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{rest:02d}s'
