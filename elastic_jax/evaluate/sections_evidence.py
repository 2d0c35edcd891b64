"""The report's sections of further evidence: other costs, baselines, sizes between the budgets, the config's evaluators."""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from elastic_jax.evaluate.charts import Points, Scale, Series, fit, lines, plot, short
from elastic_jax.evaluate.page import budget_colour, legend, section, table
from elastic_jax.evaluate.pareto import drawable, frontier
from elastic_jax.evaluate.run_log import Line, RunLog
from elastic_jax.evaluate.summary import human, percent

COSTS = {'active_parameters': 'active parameters', 'flops_per_token': 'FLOPs per token'}
# The score that stands for an evaluator, the first that it has, and whether more is better.
HEADLINES = {'exact_match': True, 'accuracy': True, 'bits_per_byte': False}


def costs(log: RunLog) -> str:
    """Bits per byte against what else a size costs."""
    if not log.final or not math.isfinite(log.final['parent']['bits_per_byte']):
        return ''
    figures = ''
    for cost, label in COSTS.items():
        every = [*log.final['rows'], log.final['parent']]
        if any(row[cost] != row['parameters'] for row in every):  # without experts every parameter is active
            figures += f'<figure><h3>{label}</h3>{_against(log, cost, label)}</figure>'
    if not figures:
        return ''
    keys = legend(
        [(row['name'], budget_colour(log.budgets, row['name']), 1.0) for row in log.final['rows']] + [('parent', 'p', 1.0)]
    )
    return section('Quality against cost', f'{keys}<div class="pair">{figures}</div>', 'Held-out bits per byte; lower is better.')


def _against(log: RunLog, cost: str, label: str) -> str:
    parent = log.final['parent']
    rows = sorted(drawable(log.final['rows']), key=lambda row: row[cost])
    points = [(row['name'], budget_colour(log.budgets, row['name']), row) for row in rows] + [('parent', 'p', parent)]
    x = fit([row[cost] for _, _, row in points], pad=0.12)
    y = fit([row['bits_per_byte'] for _, _, row in points], pad=0.15)
    path = _path([(row[cost], row['bits_per_byte']) for row in frontier(rows)], x, y)
    marks = f'<path class="level" d="M0 {100 - y.at(parent["bits_per_byte"]):.2f}H100"/><path class="frontier" d="{path}"/>'
    over = ''
    for name, colour, row in points:
        tip = f'{name}: {human(row[cost])}, {percent(row[cost] / parent[cost])} of the parent’s, {row["bits_per_byte"]:.4f}'
        over += _dot(x, y, row[cost], row['bits_per_byte'], colour, tip)
    ticks = [(tick, human(tick)) for tick in x.ticks(4)]
    return plot(marks, x, y, f'held-out bits per byte against {label}', y_label='bits per byte', over=over, x_ticks=ticks)


def _path(points: Points, x: Scale, y: Scale) -> str:
    return 'M' + 'L'.join(f'{x.at(a):.2f} {100 - y.at(b):.2f}' for a, b in points) if points else ''


def _dot(x: Scale, y: Scale, cost: float, score: float, colour: str, tip: str) -> str:
    return f'<i class="dot {colour}" style="left:{x.at(cost):.2f}%;bottom:{y.at(score):.2f}%" data-tip="{html.escape(tip)}"></i>'


def baselines(log: RunLog) -> str:
    """Models that were trained otherwise, beside the budgets nearest to them in size."""
    if not log.final or not log.baselines:
        return ''
    rows, parent = drawable(log.final['rows']), log.final['parent']
    if not rows:
        return ''
    every = drawable([*log.baselines.values(), *rows, parent])
    sizes = [row['parameters'] for row in every]
    x = fit(sizes, log=max(sizes) > 8 * min(sizes), pad=0.12)
    y = fit([row['bits_per_byte'] for row in every], pad=0.15)
    path = _path([(row['parameters'], row['bits_per_byte']) for row in frontier(rows)], x, y)
    over, cells = '', []
    for row in [*rows, *drawable([parent])]:
        colour = budget_colour(log.budgets, row['name']) if row is not parent else 'p'
        over += _dot(x, y, row['parameters'], row['bits_per_byte'], colour, f'{row["name"]}: {row["bits_per_byte"]:.4f}')
    for name, row in log.baselines.items():
        score = row['bits_per_byte'] if math.isfinite(row['bits_per_byte']) else y.high
        place = f'style="left:{x.at(row["parameters"]):.2f}%;bottom:{y.at(score):.2f}%"'
        over += f'<i class="dot square" {place} data-tip="{html.escape(name)}: {row["bits_per_byte"]:.4f}"></i>'
        over += f'<span class="beside" {place}>{html.escape(name)}</span>'
        tokens = short(row['tokens'])
        near = min(rows, key=lambda own: abs(own['parameters'] - row['parameters']))
        cells.append(
            [
                html.escape(name),
                human(row['parameters']),
                tokens,
                f'<b>{row["bits_per_byte"]:.4f}</b>',
                html.escape(f'{near["name"]}, {human(near["parameters"])}'),
                f'{near["bits_per_byte"]:.4f}',
                f'{near["bits_per_byte"] - row["bits_per_byte"]:+.4f}',
            ]
        )
    ticks = [(tick, human(tick)) for tick in x.ticks(5)]
    chart = plot(
        f'<path class="frontier" d="{path}"/>', x, y, 'bits per byte of nested sizes and baselines', y_label='bits per byte',
        x_label='parameters', over=over, x_ticks=ticks,
    )  # fmt: skip
    head = ('baseline', 'parameters', 'tokens', 'bits/byte', 'nested size', 'bits/byte', 'nested − baseline')
    keys = legend([(row['name'], budget_colour(log.budgets, row['name']), 1.0) for row in rows])
    note = (
        'Squares are models of other runs, scored on the held-out text of their own; tokens are those of all its stages. '
        f'This run had {short(log.tokens)} for all its budgets together. Below zero the nested size is better.'
    )
    return section('Beside models trained otherwise', keys + chart + table(head, cells), note)


def any_size(log: RunLog) -> str:
    """What `elastic pareto` found between the budgets."""
    rows = [row for row in log.frontier if math.isfinite(row['bits_per_byte'])]
    if not rows:
        return ''
    cost = rows[0]['cost_of']
    text_of = lambda value: f'{1e3 * value:.3g} ms' if cost == 'latency' else human(value, 'B' if cost == 'memory' else '')
    best = [row for row in rows if row['frontier']]
    known = [row['bits_per_byte'] for row in rows if row['frontier'] or row['name']]
    most = max(known) + 0.6 * (max(known) - min(known))
    shown = [row for row in rows if row['bits_per_byte'] <= most]
    x, y = fit([row['cost'] for row in shown], pad=0.08), fit([row['bits_per_byte'] for row in shown], pad=0.12)
    marks = f'<path class="frontier" d="{_path([(row["cost"], row["bits_per_byte"]) for row in best], x, y)}"/>'
    over = ''
    for row in sorted(shown, key=lambda row: (bool(row['name']), row['frontier'])):
        what = row['name'] or row['origin']
        tip = f'{what}: {text_of(row["cost"])}, {row["bits_per_byte"]:.4f} bits per byte; {row["widths"]}'
        colour = budget_colour(log.budgets, row['name']) if row['name'] else 'any' if row['frontier'] else 'any other'
        over += _dot(x, y, row['cost'], row['bits_per_byte'], colour, tip)
    ticks = [(tick, text_of(tick)) for tick in x.ticks(6)]
    label = {'active': 'active parameters', 'memory': 'bytes to serve', 'flops': 'FLOPs per token', 'latency': 'decoding step'}
    chart = plot(
        marks, x, y, 'bits per byte against cost of every candidate', y_label='held-out bits per byte',
        x_label=label.get(cost, 'parameters'), over=over, size='tall', x_ticks=ticks,
    )  # fmt: skip
    keys = legend([(row['name'], budget_colour(log.budgets, row['name']), 1.0) for row in rows if row['name']])
    listed = ''.join(
        f'<b>{text_of(row["cost"])}</b><code>{html.escape(row["widths"]).replace(",", ",<wbr>")}</code>' for row in best
    )
    widths = f'<details><summary>widths of the frontier</summary><div class="widthlist">{listed}</div></details>'
    hidden = f' {len(rows) - len(shown)} lie above the chart.' if len(shown) < len(rows) else ''
    step = rows[0]['step']
    earlier = f' of step {step}, not of the last, {log.step},' if step not in (None, log.step) else ''
    note = (
        f'{len(rows)} sizes of the same checkpoint{earlier} by elastic pareto, {len(best)} of which no other beats. '
        f'Only the named ones were trained.{hidden}'
    )
    return section('Any size in between', keys + chart + widths, note)


def evaluators(log: RunLog) -> str:
    """The scores of the config's evaluators: the last of every budget, and their course where there is one."""
    if not log.of('evaluator'):
        return ''
    by_name: dict[str, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in log.of('evaluator'):
        by_name[line['evaluator']][line['budget']].append(line)
    order = [name for name in log.budgets if any(name in own for own in by_name.values())]
    rows, figures = [], ''
    for name, own in by_name.items():
        key = next((key for key in HEADLINES if key in next(iter(own.values()))[-1]['scores']), None)
        if key is None:
            continue
        last = {budget: taken[-1]['scores'] for budget, taken in own.items()}
        chance = next(iter(last.values())).get('chance')
        finite = [score[key] for score in last.values() if math.isfinite(score[key])]
        best = (max if HEADLINES[key] else min)(finite, default=None)
        cells = [_score(key, last[budget][key], best) if budget in last else '' for budget in order]
        what = key.replace('_', ' ') + (f', chance {percent(chance)}' if chance is not None else '')
        rows.append([html.escape(name), html.escape(what), *cells])
        figures += _course(log, name, key, own)
    heads = ('evaluator', 'score', *order)
    note = 'Run with the held-out evaluation, on the same slices. The best of a row is bold.'
    return section('Evaluators', table(heads, rows) + (f'<div class="pair">{figures}</div>' if figures else ''), note)


def _score(key: str, value: float, best: float | None) -> str:
    text = percent(value, 1) if HEADLINES[key] else f'{value:.4f}'
    return f'<b>{text}</b>' if value == best else text


def _course(log: RunLog, name: str, key: str, own: Mapping[str, Sequence[Line]]) -> str:
    parts = {
        budget: [(line['step'], line['scores'][key]) for line in own[budget] if math.isfinite(line['scores'][key])]
        for budget in log.budgets
        if budget in own
    }
    if max(map(len, parts.values()), default=0) < 2:
        return ''
    drawn = [Series(budget, budget_colour(log.budgets, budget), [points]) for budget, points in parts.items()]
    label = key.replace('_', ' ')
    chart = lines(drawn, f'{name}: {label}', y_label=label)
    keys = legend([(one.name, one.colour, 1.0) for one in drawn])
    return f'<figure><h3>{html.escape(name)}</h3>{chart}{keys}</figure>'
