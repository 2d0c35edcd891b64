"""The report's section about time: what the run's seconds went to, and how fast each stage's steps were."""

from __future__ import annotations

import html
import statistics
from collections import defaultdict

from elastic_jax.evaluate.charts import short
from elastic_jax.evaluate.page import legend, section, table
from elastic_jax.evaluate.run_log import Line, RunLog
from elastic_jax.evaluate.summary import duration, percent

# Part -> colour class and opacity.
PARTS = {
    'step': ('b1', 1.0),
    'compile': ('b2', 1.0),
    'startup': ('b0', 1.0),
    'data': ('b3', 1.0),
    'eval': ('b5', 1.0),
    'save': ('b4', 1.0),
    'other': ('p', 0.35),
}


def time_spent(log: RunLog) -> str:
    """Goodput as one bar over all processes that the run took, and a row of speeds per stage."""
    if not log.of('train'):
        return ''
    processes = {line['process_start']: line for line in log.of('goodput')}
    bar = _bar(list(processes.values())) if processes else ''
    head = ('stage', 'steps logged', 'seconds per step', 'waits for data', 'tokens per second', 'FLOP/s', 'MFU')
    by_stage: dict[str, list[Line]] = defaultdict(list)
    for line in log.of('train'):
        by_stage[line['stage']].append(line)
    rows = [[html.escape(name), f'{len(lines):,}', *_speeds(lines)] for name, lines in by_stage.items()]
    note = 'Medians of the logged steps. FLOPs are those the mathematics needs, in closed form; MFU is their share of the peak.'
    if processes:
        note += ' The bar sums over the processes that the run took, each up to its last line; step is what a device waits for.'
    return section('Time', bar + table(head, rows), note)


def _bar(lines: list[Line]) -> str:
    seconds = {part: sum(line['seconds'].get(part, 0.0) for line in lines) for part in PARTS}
    total = sum(seconds.values()) or 1.0
    cells = ''.join(
        f'<i class="{colour}" style="width:{100 * seconds[part] / total:.2f}%;opacity:{opacity:.2f}"></i>'
        for part, (colour, opacity) in PARTS.items()
    )
    keys = legend(
        [
            (f'{part} {percent(seconds[part] / total, 1)}, {duration(seconds[part])}', *PARTS[part])
            for part in PARTS
            if seconds[part]
        ]
    )
    count = f' in {len(lines)} processes' if len(lines) > 1 else ''
    tip = f'{duration(total)}{count}, {percent(seconds["step"] / total, 1)} of it in steps'
    return f'<h3>Goodput {percent(seconds["step"] / total)} <small>of {duration(total)}{count}</small></h3>' + (
        f'<div class="strip" data-tip="{html.escape(tip)}">{cells}</div>{keys}'
    )


def _speeds(lines: list[Line]) -> list[str]:
    median = lambda key: statistics.median(line[key] for line in lines if key in line)
    has = lambda key: any(key in line for line in lines)
    waits = [line.get('data_seconds', 0.0) / line['seconds'] for line in lines if line['seconds']]
    return [
        f'{median("seconds"):.3g}',
        percent(statistics.median(waits), 1) if waits else '',
        f'{median("tokens_per_second"):,.0f}',
        short(median('flops_per_second')) if has('flops_per_second') else '',
        percent(median('mfu'), 1) if has('mfu') else '',
    ]
