"""The table at the end of a run: every budget's size and quality, before and after elastic training, beside the parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic_jax.arch import Arch
from elastic_jax.cost import cost_of

Score = Mapping[str, float]
Row = dict[str, Any]


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
    rows = []
    for name, arch in archs.items():
        cost = cost_of(arch, context)
        rows.append(
            {
                'name': name,
                'widths': arch.widths(),
                'layers': _layer_widths(arch),
                'parameters': cost.parameters,
                'active_parameters': cost.active_parameters,
                'bytes': cost.bytes,
                'flops_per_token': cost.flops_per_token,
                'bits_per_byte': after[name]['bits_per_byte'],
                'before_bits_per_byte': before[name]['bits_per_byte'],
                'gap_closed': gap_closed(
                    before[name]['bits_per_byte'], after[name]['bits_per_byte'], parent_score['bits_per_byte']
                ),
            }
        )
    cost = cost_of(parent, context)
    own = {
        'name': 'parent',
        'widths': parent.widths(),
        'layers': _layer_widths(parent),
        'parameters': cost.parameters,
        'active_parameters': cost.active_parameters,
        'bytes': cost.bytes,
        'flops_per_token': cost.flops_per_token,
        'bits_per_byte': parent_score['bits_per_byte'],
    }
    return rows, own


def _layer_widths(arch: Arch) -> list[dict[str, Any]]:
    """The widths of every block, for pictures: [{'mixer': letter, axis: width, …}, …]; a dropped block has '.'."""
    blocks: list[dict[str, Any]] = [{'mixer': letter} for letter in arch.pattern]
    for axis in arch.axes():
        for i, width in arch.layer_widths(axis.name).items():
            blocks[i][axis.name] = width
    return blocks


def gap_closed(before: float, after: float, parent: float) -> float | None:
    """Share of a slice's gap to the parent that elastic training closed; None where there was none."""
    return (before - after) / (before - parent) if before - parent > 1e-6 else None


def format_table(rows: Sequence[Row], parent: Row) -> str:
    """The table for a terminal."""
    header = ('budget', 'parameters', 'active', 'bf16', 'FLOPs/token', 'bits/byte', 'before', 'gap closed', 'widths')
    lines = [header]
    whole = parent['parameters']
    for row in [*rows, parent]:
        closed = row.get('gap_closed')
        lines.append(
            (
                row['name'],
                f'{human(row["parameters"])} ({row["parameters"] / whole:.0%})',
                human(row['active_parameters']),
                human(row['bytes'], 'B'),
                human(row['flops_per_token']),
                f'{row["bits_per_byte"]:.4f}',
                f'{row["before_bits_per_byte"]:.4f}' if 'before_bits_per_byte' in row else '',
                f'{closed:.0%}' if closed is not None else '',
                format_widths(row['widths']),
            )
        )
    sizes = [max(len(line[column]) for line in lines) for column in range(len(header))]
    aligned = []
    for line in lines:
        cells = [
            cell.ljust(size) if i in (0, 8) else cell.rjust(size) for i, (cell, size) in enumerate(zip(line, sizes, strict=True))
        ]
        aligned.append('  '.join(cells).rstrip())
    rule = '  '.join('-' * size for size in sizes[:-1])
    return '\n'.join([aligned[0], rule, *aligned[1:]])


def format_widths(widths: Mapping[str, int]) -> str:
    """Widths as `--widths` takes them."""
    return ','.join(f'{name}={width}' for name, width in widths.items())


def human(value: float, unit: str = '') -> str:
    """A count in thousands, millions, …: 1.02M, 3.9 MB."""
    for size, letter in ((1e12, 'T'), (1e9, 'G' if unit else 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size:
            return f'{value / size:.3g} {letter}{unit}' if unit else f'{value / size:.3g}{letter}'
    return f'{value:.3g}{" " + unit if unit else ""}'
