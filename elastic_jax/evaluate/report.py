"""`report.html` and `pareto.png` of a run: one page without network, and one picture."""

from __future__ import annotations

import base64
import html
import json
import statistics
from collections import defaultdict
from typing import Any

from etils import epath
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elastic_jax.errors import UserError
from elastic_jax.evaluate import svg
from elastic_jax.evaluate.page import PAGE
from elastic_jax.evaluate.summary import format_widths, human
from elastic_jax.metrics import read_metrics

Lines = dict[str, list[dict[str, Any]]]
BUDGET_COLOURS = ('#2563eb', '#0d9488', '#d97706', '#9333ea', '#dc2626', '#475569')


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` (and `pareto.png` once budgets are scored) and returns the page's path.

    Works on a run in progress: what is not there yet is said. Raises UserError when the workdir holds no run.
    """
    workdir = epath.Path(workdir)
    if not (workdir / 'config.json').exists():
        raise UserError(f'{workdir} holds no run (there is no config.json); give the --workdir of elastic train')
    try:
        config = json.loads((workdir / 'config.json').read_text())
    except json.JSONDecodeError as error:
        raise UserError(f'{workdir}/config.json is not JSON ({error}); restore it') from error
    by_kind: Lines = defaultdict(list)
    for line in read_metrics(workdir):
        by_kind[line['kind']].append(line)
    sections = [
        _table(by_kind),
        _pareto(by_kind, workdir),
        _losses(by_kind),
        _widths(by_kind),
        _frozen(by_kind),
        _router(by_kind),
        _experts(by_kind),
        _samples(by_kind),
        _section(
            'Config', f'<details><summary>every key</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre></details>'
        ),
    ]
    title = html.escape(f'elastic run: {config.get("name", workdir.name)}')
    page = PAGE.replace('{{title}}', title).replace('{{body}}', ''.join(sections))
    (workdir / 'report.html').write_text(page)
    return workdir / 'report.html'


def _section(title: str, body: str, note: str = '') -> str:
    note = f'<p class="note">{note}</p>' if note else ''
    return f'<section><h2>{title}</h2>{note}{body}</section>'


def _missing(title: str, what: str) -> str:
    return _section(title, f'<p class="missing">Not there yet: {what}.</p>')


def _legend(names: list[str], kind: str = 'c') -> str:
    keys = ''.join(f'<span><i class="key {kind}{n % 6}"></i>{html.escape(str(name))}</span>' for n, name in enumerate(names))
    return f'<p class="legend">{keys}</p>'


def _table(lines: Lines) -> str:
    if not lines['final']:
        return _missing('Result', 'the final table is written when the last stage ends')
    final = lines['final'][-1]
    whole = final['parent']['parameters']
    rows = ''
    for row in [*final['rows'], final['parent']]:
        closed = row.get('gap_closed')
        cells = [
            html.escape(row['name']),
            f'{human(row["parameters"])} <small>{row["parameters"] / whole:.0%}</small>',
            human(row['active_parameters']),
            human(row['bytes'], 'B'),
            human(row['flops_per_token']),
            f'<b>{row["bits_per_byte"]:.4f}</b>',
            f'{row["before_bits_per_byte"]:.4f}' if 'before_bits_per_byte' in row else '',
            f'{closed:.0%}' if closed is not None else '',
        ]
        rows += '<tr>' + ''.join(f'<td>{cell}</td>' for cell in cells) + '</tr>'
    head = ''.join(
        f'<th>{name}</th>'
        for name in ('budget', 'parameters', 'active', 'bf16', 'FLOPs/token', 'bits/byte', 'before elastic', 'gap closed')
    )
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section(
        'Result',
        body,
        'Held-out bits per byte of every size in the one checkpoint; beside it the same slices before elastic training.',
    )


def _pareto(lines: Lines, workdir: epath.Path) -> str:
    if not lines['final']:
        return _missing('Quality against size', 'budgets are scored when the last stage ends')
    final = lines['final'][-1]
    rows, parent = sorted(final['rows'], key=lambda row: row['parameters']), final['parent']
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = [row['parameters'] / 1e6 for row in rows]
    after, before = [row['bits_per_byte'] for row in rows], [row['before_bits_per_byte'] for row in rows]
    axes.plot(sizes, before, 'o--', color='#94a3b8', label='sliced, before elastic training')
    axes.plot(sizes, after, 'o-', color=BUDGET_COLOURS[0], linewidth=2.2, label='after elastic training')
    axes.scatter(
        [parent['parameters'] / 1e6],
        [parent['bits_per_byte']],
        marker='*',
        s=170,
        color=BUDGET_COLOURS[2],
        label='parent',
        zorder=3,
    )
    for row, size, low, high in zip(rows, sizes, after, before, strict=True):
        axes.annotate(
            '', (size, low), (size, high), arrowprops={'arrowstyle': '->', 'color': '#cbd5e1', 'shrinkA': 6, 'shrinkB': 6}
        )
        axes.annotate(
            f'{row["name"]}  {low:.3f}', (size, low), xytext=(0, -14), textcoords='offset points', ha='center', fontsize=9
        )
    axes.margins(x=0.12, y=0.14)
    axes.set_xlabel('parameters (millions)')
    axes.set_ylabel('held-out bits per byte')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#e2e8f0')
    axes.legend(frameon=False, fontsize=9)
    with (workdir / 'pareto.png').open('wb') as file:
        figure.savefig(file, format='png')
    picture = base64.b64encode((workdir / 'pareto.png').read_bytes()).decode()
    body = f'<img alt="bits per byte against parameters" src="data:image/png;base64,{picture}">'
    return _section('Quality against size', body)


def _bands(lines: Lines) -> list[tuple[str, float, float]]:
    bands: dict[str, list[float]] = {}
    for line in lines['train']:
        bands.setdefault(line['stage'], [line['step'] - line['stage_step'], 0])[1] = line['step']
    return [(name, start, end) for name, (start, end) in bands.items()]


def _losses(lines: Lines) -> str:
    if not lines['train']:
        return _missing('Loss', 'no step has been logged')
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    parent: list[tuple[float, float]] = []
    for line in lines['train']:
        own = {key.removeprefix('loss/'): value for key, value in line.items() if key.startswith('loss/')}
        for name, value in own.items():
            series[name].append((line['step'], float(value)))
        if not own:
            parent.append((line['step'], float(line['loss'])))
    body = ''
    if parent:
        bands = [band for band in _bands(lines) if any(band[1] < step <= band[2] for step, _ in parent)]
        curve = svg.lines({'parent': parent}, 'step', 'cross-entropy, nats', 'pretraining loss', bands)
        body += f'<figure>{curve}<figcaption>Pretraining the parent</figcaption></figure>'
    if series:
        order = [name for name in _budget_names(lines) if name in series] or list(series)
        smooth = {name: _smooth(series[name]) for name in order}
        bands = [band for band in _bands(lines) if not any(band[1] < step <= band[2] for step, _ in parent)]
        curve = svg.lines(smooth, 'step', 'KL to the parent, nats', 'distillation loss of every budget', bands, log_y=True)
        body += f'<figure>{curve}{_legend(order)}<figcaption>Distillation loss of every budget, logarithmic</figcaption></figure>'
    speeds = defaultdict(list)
    for line in lines['train']:
        speeds[line['stage']].append(line['tokens_per_second'])
    note = 'Tokens per second (median): ' + ', '.join(f'{name} {statistics.median(own):,.0f}' for name, own in speeds.items())
    return _section('Loss', f'<div class="pair">{body}</div>', html.escape(note))


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Median of five neighbours: single batches are noisy."""
    values = [value for _, value in points]
    return [(x, statistics.median(values[max(0, i - 2) : i + 3])) for i, (x, _) in enumerate(points)]


def _budget_names(lines: Lines) -> list[str]:
    if lines['final']:
        return [row['name'] for row in lines['final'][-1]['rows']]
    return list(lines['frozen'][-1]['budgets']) if lines['frozen'] else []


def _widths(lines: Lines) -> str:
    if not lines['final']:
        return _missing('Nested widths', 'widths are known when the last stage ends')
    final = lines['final'][-1]
    parent, rows = final['parent']['layers'], final['rows']
    figures = ''
    axes = [axis for axis in dict.fromkeys(axis for block in parent for axis in block) if axis != 'mixer']
    for axis in axes:
        bars = ''
        for i, block in enumerate(parent):
            if axis not in block:
                continue
            nested = ''
            for n, row in enumerate(rows):
                width = row['layers'][i].get(axis, 0)
                share = 100 * width / block[axis]
                nested += (
                    f'<i class="nest c{n % 6}" style="width:{share:.1f}%" title="{html.escape(row["name"])} {axis} {width}"></i>'
                )
            widths = ' · '.join(str(row['layers'][i].get(axis, 0)) for row in rows)
            bars += f'<div class="bar"><span>{i} {html.escape(block["mixer"])}</span><b>{nested}</b><em>{widths}</em></div>'
        figures += f'<div class="axis"><h3>{html.escape(axis)}</h3>{bars}</div>'
    embed = ''.join(
        f'<i class="nest c{n % 6}" style="width:{100 * row["widths"]["embed"] / final["parent"]["widths"]["embed"]:.1f}%"></i>'
        for n, row in enumerate(rows)
    )
    widths = ' · '.join(str(row['widths']['embed']) for row in rows)
    figures = (
        f'<div class="axis"><h3>embed</h3><div class="bar"><span>all</span><b>{embed}</b><em>{widths}</em></div></div>' + figures
    )
    names = [row['name'] for row in rows]
    note = 'Each budget keeps a prefix of the units of every block, in order of importance: the smaller lie inside the larger.'
    return _section('Nested widths', _legend(names) + f'<div class="axes">{figures}</div>', note)


def _frozen(lines: Lines) -> str:
    if not lines['frozen']:
        return ''
    rows = ''
    hardening = {line['budget']: line for line in lines['hardening']}
    for name, own in lines['frozen'][-1]['budgets'].items():
        soft_hard = hardening.get(name)
        change = f'{soft_hard["soft_loss"]:.3f} → {soft_hard["hard_loss"]:.3f}' if soft_hard else ''
        miss = own['share'] / own['target'] - 1
        cells = [
            name,
            f'{own["target"]:.1%}',
            f'{own["argmax_share"]:.1%}',
            f'{own["share"]:.1%} ({miss:+.1%})',
            change,
            own['note'],
        ]
        rows += '<tr>' + ''.join(f'<td>{html.escape(cell)}</td>' for cell in cells) + '</tr>'
        rows += f'<tr><td></td><td colspan="5"><code>{html.escape(format_widths(own["widths"]))}</code></td></tr>'
    head = ''.join(f'<th>{name}</th>' for name in ('budget', 'target', 'argmax', 'frozen (miss)', 'loss, soft → hard', 'note'))
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section('Widths found by the router', body)


def _router(lines: Lines) -> str:
    if not lines['router']:
        return _missing('Router', 'there has been no search stage')
    last = lines['router'][-1]
    body = ''
    for budget in last['probabilities']:
        figures = ''
        for axis, rows in last['probabilities'][budget].items():
            shares = []
            for line in lines['router']:
                own = line['probabilities'][budget][axis]
                shares.append((line['step'], [sum(row[c] for row in own) / len(own) for c in range(len(own[0]))]))
            names = line_choices = last['choices'][axis]
            mean = ', mean over blocks' if len(rows) > 1 else ''
            chart = svg.stacked(shares, [str(name) for name in names], f'{budget} {axis}') if len(shares) > 1 else ''
            figures += f'<figure>{chart}{_legend(line_choices, "s")}<figcaption>{html.escape(axis)}{mean}</figcaption></figure>'
        body += f'<details {"open" if budget == list(last["probabilities"])[-1] else ""}><summary>{html.escape(budget)}</summary><div class="grid3">{figures}</div></details>'
    return _section('Router probabilities over time', body)


def _experts(lines: Lines) -> str:
    if not lines['experts']:
        return ''
    body = ''
    for budget, blocks in lines['experts'][-1]['load'].items():
        cells = ''
        for block, load in blocks.items():
            top = max(load)
            bars = ''.join(
                f'<i style="height:{100 * own / top if top else 0:.0f}%" title="expert {e}: {own:.1%}"></i>'
                for e, own in enumerate(load)
            )
            cells += f'<div class="load"><div>{bars}</div><small>{html.escape(block)}</small></div>'
        body += f'<div class="loads"><span>{html.escape(budget)}</span>{cells}</div>'
    return _section('Expert load', body, 'Share of the tokens that each expert received in the last logged step.')


def _samples(lines: Lines) -> str:
    if not lines['samples']:
        return ''
    body = ''.join(
        f'<div class="sample"><b>{html.escape(line["budget"])}</b><pre><mark>{html.escape(line["prompt"])}</mark>{html.escape(line["text"])}</pre></div>'
        for line in lines['samples']
    )
    return _section('Samples, greedy', f'<div class="samples">{body}</div>')
