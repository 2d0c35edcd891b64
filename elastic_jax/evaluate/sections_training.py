"""The report's sections about the training: losses, what the router did, and how the experts are used."""

from __future__ import annotations

import html
import math
import statistics
from collections import defaultdict
from typing import Any

from elastic_jax.evaluate.charts import Points, Scale, Series, lines, plot, shade, stacked
from elastic_jax.evaluate.page import budget_colour, legend, section, table, width_list
from elastic_jax.evaluate.run_log import Line, RunLog, StageSpan
from elastic_jax.evaluate.summary import percent

LOSS_OF = {
    'frozen': 'KL to the parent, nats per token',
    'cached': 'KL to the parent by its cached logits, nats per token',
    'self': 'KL to the full budget, nats per token',
    'none': 'cross-entropy, nats per token',
}


def losses(log: RunLog) -> str:
    """Loss curves per budget with the stages behind them, and held-out scores where they were taken."""
    if not log.of('train'):
        return ''
    whole: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by_budget: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in log.of('train'):
        own = {key.removeprefix('loss/'): value for key, value in line.items() if key.startswith('loss/')}
        for name, value in own.items():
            by_budget[name][line['stage']].append((line['step'], value))
        if not own:
            whole[line['stage']].append((line['step'], line['loss']))
    figures = ''
    if whole:
        points = list(whole.values())
        one = Series('parent', 'p', [_smooth(part) for part in points], points)
        x, bands = _span([stage for stage in log.stages if stage.name in whole], log.step)
        chart = lines([one], 'pretraining loss', x=x, y_label='cross-entropy, nats per token', bands=bands)
        figures += f'<figure><h3>Pretraining the parent</h3>{chart}</figure>'
    if by_budget:
        order = [name for name in log.budgets if name in by_budget] + [name for name in by_budget if name not in log.budgets]
        drawn = [
            Series(name, budget_colour(log.budgets, name), [_smooth(p) for p in parts], parts)
            for name, parts in ((name, list(by_budget[name].values())) for name in order)
        ]
        trained = {stage for own in by_budget.values() for stage in own}
        x, bands = _span([stage for stage in log.stages if stage.name in trained], log.step)
        label = LOSS_OF.get(log.config.get('teacher', ''), 'loss, nats per token')
        chart = lines(drawn, 'loss of every budget', x=x, y_label=f'{label} (log)', log=True, bands=bands)
        keys = legend([(one.name, one.colour, 1.0) for one in drawn])
        figures += f'<figure><h3>Training loss of every budget</h3>{chart}{keys}</figure>'
    figures += _heldout(log)
    note = 'Bold: median of neighbouring steps; faint: every logged step.'
    return section('Loss', f'<div class="pair">{figures}</div>', note)


def _span(stages: list[StageSpan], step: int) -> tuple[Scale, list[tuple[str, float, float]]]:
    """The steps of some stages up to now, and the stages as bands."""
    low, high = min(stage.start for stage in stages), max(stage.end for stage in stages)
    bands = [(stage.name, stage.start, stage.end) for stage in stages]
    return Scale(low, max(low + 1, min(high, step))), bands


def _smooth(points: Points) -> Points:
    """Running median over about a fifteenth of the points, or five: single batches are noisy."""
    half = max(len(points) // 30, min(2, len(points) // 5))
    values = [value for _, value in points]
    return [(x, statistics.median(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def _heldout(log: RunLog) -> str:
    if not log.of('eval'):
        return ''
    parts: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in log.of('eval'):
        parts[line['budget']][line['stage']].append((line['step'], line['bits_per_byte']))
    order = [name for name in log.budgets if name in parts]
    drawn = [Series(name, budget_colour(log.budgets, name), list(parts[name].values())) for name in order]
    seen = {stage for own in parts.values() for stage in own}
    x, bands = _span([stage for stage in log.stages if stage.name in seen], log.step)
    parent = log.final['parent']['bits_per_byte'] if log.final else math.nan
    level = (f'parent {parent:.3f}', parent) if math.isfinite(parent) else None
    chart = lines(drawn, 'held-out bits per byte', x=x, y_label='held-out bits per byte', bands=bands, level=level)
    keys = legend([(one.name, one.colour, 1.0) for one in drawn])
    return f'<figure><h3>Held-out bits per byte while training</h3>{chart}{keys}</figure>'


def frozen_widths(log: RunLog) -> str:
    """What the router's widths cost against what was asked, and what hardening the masks did to the loss."""
    if not log.of('frozen'):
        return ''
    hardening = {line['budget']: line for line in log.of('hardening')}
    rows, budgets = [], log.of('frozen')[-1]['budgets']
    for name, own in budgets.items():
        change = hardening.get(name)
        colour, miss = budget_colour(log.budgets, name), own['share'] / own['target'] - 1
        rows.append(
            [
                f'<i class="key {colour}"></i>{html.escape(name)}',
                percent(own['target'], 1),
                percent(own['argmax_share'], 1),
                f'<b>{percent(own["share"], 1)}</b>',
                f'{"+" if miss >= 0 else "−"}{percent(abs(miss), 1)}',
                f'{change["soft_loss"]:.3f} → {change["hard_loss"]:.3f}' if change else '',
                f'<span class="prose">{html.escape(own["note"])}</span>',
            ]
        )
    head = ('budget', 'asked', 'router’s argmax', 'frozen', 'miss', 'loss, soft → hard', '')
    note = (
        f'Shares of the parent’s {log.config.get("metric", "cost").replace("_", " ")}. Freezing takes the most probable width of '
        'every axis, then steps along the grid until the budget is met. The loss is held-out cross-entropy under the soft masks '
        'of the search and on the hard slice.'
    )
    widths = '' if log.final else width_list({name: own['widths'] for name, own in budgets.items()})
    return section('Widths found by the router', table(head, rows) + widths, note)


def router(log: RunLog) -> str:
    """Probabilities of every axis's choices over time, a column per budget."""
    if not log.of('router'):
        return ''
    last, body = log.of('router')[-1], ''
    order = [name for name in log.budgets if name in last['probabilities']]
    for axis, widths in last['choices'].items():
        names = [str(width) for width in widths]
        figures = ''.join(_choices(log, budget, axis, names) for budget in order)
        blocks = len(last['probabilities'][order[0]][axis])
        kind = f' <small>mean of {blocks} rows, each at the end below</small>' if blocks > 1 else ''
        keys = legend([(name, 'p', shade(n, len(names))) for n, name in enumerate(names)])
        head = f'<div class="choices"><h3>{html.escape(axis)}{kind}</h3>{keys}</div>'
        body += f'<div class="group">{head}<div class="multiples">{figures}</div></div>'
    note = 'The stronger the colour, the larger the width. Beside each budget stands its most probable width by now.'
    return section('Router probabilities over time', body, note)


def _choices(log: RunLog, budget: str, axis: str, names: list[str]) -> str:
    colour = budget_colour(log.budgets, budget)
    steps, shares = [], []
    for line in log.of('router'):
        rows = line['probabilities'][budget][axis]
        share = [sum(row[n] for row in rows) / len(rows) for n in range(len(names))]
        if all(map(math.isfinite, share)):
            steps.append(line['step'])
            shares.append(share)
    if not steps:
        return f'<figure><p class="missing">{html.escape(budget)}: no finite probabilities.</p></figure>'
    chart = stacked(steps, shares, names, colour, f'{budget}: probability of each {axis}')
    rows, strips = log.of('router')[-1]['probabilities'][budget][axis], ''
    for i, row in enumerate(rows if len(rows) > 1 else ()):
        cells = ''.join(
            f'<i class="{colour}" style="width:{100 * own:.1f}%;opacity:{shade(n, len(names)):.2f}"></i>'
            for n, own in enumerate(row)
            if own >= 0.005
        )
        tip = ', '.join(f'{name}: {percent(own)}' for name, own in zip(names, row, strict=True))
        strips += f'<div class="strip" data-tip="{html.escape(f"{axis}, row {i}: {tip}")}">{cells}</div>'
    best = dict.fromkeys(names[max(range(len(row)), key=row.__getitem__)] for row in rows)
    head = f'<h3><i class="key {colour}"></i>{html.escape(budget)} <small>{", ".join(best)}</small></h3>'
    return f'<figure{" class=thin" if len(rows) > 8 else ""}>{head}{chart}{strips}</figure>'


def experts(log: RunLog) -> str:
    """Share of the tokens that every expert gets, per budget and block."""
    if not log.of('experts'):
        return ''
    latest: dict[str, Line] = {}
    for line in log.of('experts'):
        latest |= {budget: {'step': line['step'], 'load': load} for budget, load in line['load'].items() if load}
    order = [name for name in log.budgets if name in latest] + [name for name in latest if name not in log.budgets]
    blocks = list(dict.fromkeys(block for name in order for block in latest[name]['load']))
    most = {block: max(len(latest[name]['load'].get(block, ())) for name in order) for block in blocks}
    body = ''
    for block in blocks:
        figures = ''.join(_load(log, name, latest[name], block, most[block]) for name in order)
        body += f'<div class="group"><h3>{html.escape(_block_name(block))}</h3><div class="multiples">{figures}</div></div>'
    note = 'Share of the routed tokens that every expert received in the last logged step; the dashed line is an even share.'
    return section('Expert load', body, note)


def _block_name(layer: str) -> str:
    """'layer_007' -> 'block 7'."""
    number = layer.removeprefix('layer_')
    return f'block {int(number)}' if number.isdigit() else layer


def _load(log: RunLog, budget: str, latest: dict[str, Any], block: str, most: int) -> str:
    colour, load = budget_colour(log.budgets, budget), latest['load'].get(block, [])
    head = f'<h3><i class="key {colour}"></i>{html.escape(budget)} <small>{len(load)} of {most}</small></h3>'
    finite = [own for own in load if math.isfinite(own)]
    if not finite:
        return f'<figure>{head}<p class="missing">dropped or not finite</p></figure>'
    x, y = Scale(0, most), Scale(0.0, 1.1 * max(*finite, 1.5 / len(load)))
    bars = ''.join(
        f'M{x.at(e + 0.1):.2f} 100V{100 - y.at(own):.2f}H{x.at(e + 0.9):.2f}V100Z' for e, own in enumerate(load) if own > 0
    )
    even = 100 - y.at(1 / len(load))
    marks = f'<path class="bars {colour}" d="{bars}"/><path class="level" d="M0 {even:.2f}H{x.at(len(load)):.2f}"/>'
    one = {
        'n': budget,
        'c': colour,
        'x': [e + 0.5 for e in range(len(load))],
        'y': [float(f'{own:.3g}') if math.isfinite(own) else None for own in load],
    }
    data = {'series': [one], 'share': 1, 'unit': 'expert'}
    y_ticks = [(0, '0'), (1 / len(load), percent(1 / len(load)))]
    title = f'expert load of {budget}, {_block_name(block)}'
    chart = plot(marks, x, y, title, data=data, size='small wide', x_ticks=(), y_ticks=y_ticks)
    return f'<figure>{head}{chart}</figure>'


def to_come(log: RunLog) -> str:
    """What a run in progress has not written yet."""
    missing = []
    if not log.of('train'):
        missing.append('Losses: no step has been logged.')
    searches = any(stage.kind == 'search' for stage in log.stages)
    if searches and not log.of('router'):
        missing.append('Router probabilities: the search stage has not begun.')
    if searches and not log.of('frozen'):
        missing.append('Widths found by the router: they are frozen when the search stage ends.')
    if not log.final:
        missing.append('Quality against size, the final table, the nested widths and samples: written when the last stage ends.')
    items = ''.join(f'<li>{html.escape(what)}</li>' for what in missing)
    return section('Not there yet', f'<ul class="missing">{items}</ul>') if missing else ''
