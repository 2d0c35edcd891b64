"""The report's sections about the result: headline, cards, quality against size, the table, the nested widths, samples."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from elastic_jax.evaluate.page import budget_colour, legend, section, table, width_list
from elastic_jax.evaluate.pareto import pareto_charts
from elastic_jax.evaluate.run_log import RunLog
from elastic_jax.evaluate.summary import TABLE_HEAD, Row, human, percent, table_cells

Widths = tuple[int | None, ...]  # the parent's, then every budget's; None where it drops the block
MIXERS = {'M': 'Mamba-2', '*': 'attention', '-': 'MLP', 'E': 'mixture of experts'}


def headline(log: RunLog) -> str:
    """Name of the run, its result in one sentence, and how far it is."""
    stage = log.current_stage
    if log.final:
        lede = _result_sentence(log.final['rows'], log.final['parent'])
    elif stage is None:
        lede = 'All steps are done; the final evaluation is not there yet.'
    else:
        lede = f'In progress: step {log.step:,} of {log.steps:,}, in stage <b>{html.escape(stage.name)}</b>.'
    bars = ''
    for own in log.stages:
        done = min(1.0, max(0.0, (log.step - own.start) / (own.end - own.start)))
        bars += (
            f'<div style="flex:{own.end - own.start} 1 0"><i style="--done:{100 * done:.1f}%"></i><b>{html.escape(own.name)}</b>'
            f'{own.end - own.start:,} steps<br>{own.context:,} context</div>'
        )
    skipped: dict[str, int] = {}
    for line in log.of('train'):
        skipped[line['stage']] = line.get('skipped', 0)
    warning = ''
    if sum(skipped.values()):
        warning = f'<p class="warn">{sum(skipped.values()):,} updates were skipped for a non-finite loss or gradient.</p>'
    warning += ''.join(f'<p class="warn">{html.escape(sentence)}.</p>' for sentence in log.damaged)
    return (
        f'<header><p class="eyebrow">elastic_jax run</p><h1>{html.escape(log.name)}</h1><p class="lede">{lede}</p>{warning}'
        f'<div class="timeline">{bars}</div></header>'
    )


def _result_sentence(rows: Sequence[Row], parent: Row) -> str:
    small = min(rows, key=lambda row: row['parameters'])
    count = {1: 'one model', 2: 'two models', 3: 'three models', 4: 'four models', 5: 'five models'}
    sentence = f'One checkpoint, <b>{count.get(len(rows), f"{len(rows)} models")}</b>.'
    if small['parameters'] < parent['parameters']:
        share = percent(small['parameters'] / parent['parameters'])
        sentence += f' <b>{html.escape(small["name"])}</b> keeps {share} of the parameters'
        if small.get('gap_closed') is not None:
            sentence += f', and elastic training closed <b>{percent(small["gap_closed"])}</b> of its gap to the parent'
        sentence += '.'
    return sentence


def cards(log: RunLog) -> str:
    """One card per budget, with the parent beside them."""
    if not log.final:
        return ''
    parent, body = log.final['parent'], ''
    for row in [*log.final['rows'], parent]:
        colour = budget_colour(log.budgets, row['name']) if row is not parent else 'p'
        share, closed = row['parameters'] / parent['parameters'], row.get('gap_closed')
        body += (
            f'<div class="card {colour}"><h3>{html.escape(row["name"])}</h3>'
            f'<div class="big">{row["bits_per_byte"]:.3f}<small>bits per byte</small></div>'
            f'<p><b>{human(row["parameters"])}</b> parameters, {percent(share).replace(" ", "&nbsp;")}</p>'
            f'<div class="meter"><i style="width:{100 * share:.1f}%"></i></div>'
        )
        if closed is not None:
            width = 100 * min(1.0, max(0.0, closed))
            body += (
                f'<p><b>{percent(closed)}</b> of the gap closed</p><div class="meter"><i style="width:{width:.1f}%"></i></div>'
            )
        elif 'before_bits_per_byte' in row:
            change = row['bits_per_byte'] / parent['bits_per_byte'] - 1
            body += f'<p><b>{"+" if change >= 0 else "−"}{percent(abs(change), 2)}</b> against the parent</p>'
        body += '</div>'
    return f'<div class="cards">{body}</div>'


def quality(log: RunLog) -> str:
    """Bits per byte against parameters."""
    title = 'Quality against size'
    if not log.final:
        return ''
    rows, parent = log.final['rows'], log.final['parent']
    if not math.isfinite(parent['bits_per_byte']):
        return section(title, '<p class="missing">The parent has no finite score, so there is nothing to compare with.</p>')
    note = 'Held-out bits per byte; lower is better. Every size is a slice of one checkpoint, cut out with no further training.'
    return section(title, pareto_charts(rows, parent, log.budgets), note)


def result_table(log: RunLog) -> str:
    """The final table, and the widths that `elastic slice --widths` takes."""
    if not log.final:
        return ''
    rows, parent = log.final['rows'], log.final['parent']
    cells = []
    for row in [*rows, parent]:
        colour = budget_colour(log.budgets, row['name']) if row is not parent else 'p'
        name, *rest = map(html.escape, table_cells(row, parent))
        rest[5] = f'<b>{rest[5]}</b>'
        cells.append([f'<i class="key {colour}"></i>{name}', *rest])
    widths = width_list({row['name']: row['widths'] for row in rows})
    note = '“before” is the same slice of the ordered parent, before elastic training. Bytes are of the weights in bfloat16.'
    return section('Result', table(TABLE_HEAD, cells) + widths, note)


def nested_widths(log: RunLog) -> str:
    """The model as a row of blocks with the submodels inside, then every axis."""
    if not log.final:
        return ''
    rows, parent = log.final['rows'], log.final['parent']
    names = legend([(row['name'], budget_colour(log.budgets, row['name']), 1.0) for row in rows])
    groups = {name: [('', (parent['widths'][name], *(row['widths'][name] for row in rows)))] for name in ('embed', 'layers')}
    for axis in dict.fromkeys(key for block in parent['layers'] for key in block if key not in ('mixer', 'parameters')):
        groups[axis] = _alike(rows, parent, axis)
    figures, whole = '', []
    for axis, own in groups.items():
        if all(set(widths) <= {widths[0], None} for _, widths in own):
            whole.append(f'{axis} {own[0][1][0]}')
        else:
            figures += _axis(axis, own, rows, log.budgets)
    kept = f'<p class="note after">Not cut in any budget: {html.escape(", ".join(whole))}.</p>' if whole else ''
    note = (
        'Every block of the parent, and inside it what each budget keeps of its parameters: always the most important units '
        'first, so the smaller lies inside the larger.'
    )
    return section(
        'The nested model', names + _model(rows, parent, log.budgets) + f'<div class="axes">{figures}</div>{kept}', note
    )


def _model(rows: Sequence[Row], parent: Row, budgets: Sequence[str]) -> str:
    columns, labels = '', ''
    dense = len(parent['layers']) > 24
    for i, block in enumerate(parent['layers']):
        nested, tips = '', []
        for row in rows:
            share = row['layers'][i]['parameters'] / block['parameters'] if block['parameters'] else 0.0
            tips.append(f'{row["name"]} {percent(share)}')
            nested += f'<i class="{budget_colour(budgets, row["name"])}" style="--h:{100 * share:.1f}%"></i>'
        kind = MIXERS.get(block['mixer'], 'dropped')
        columns += f'<div class="block" data-tip="block {i}, {kind}: {html.escape(", ".join(tips))}">{nested}</div>'
        labels += f'<span><b>{html.escape(block["mixer"])}</b>{"" if dense else i}</span>'
    used = dict.fromkeys(block['mixer'] for block in parent['layers'])
    key = ', '.join(f'{letter} {MIXERS[letter]}' for letter in used if letter in MIXERS)
    names = f'<div class="names">{labels}</div><p class="note">{html.escape(key)}</p>'
    return f'<div class="model{" dense" if dense else ""}">{columns}</div>{names}'


def _alike(rows: Sequence[Row], parent: Row, axis: str) -> list[tuple[str, Widths]]:
    """(label, widths) of the blocks that have the axis; blocks of equal widths share a row."""
    groups: dict[Widths, list[int]] = {}
    for i, block in enumerate(parent['layers']):
        if axis in block:
            groups.setdefault((block[axis], *(row['layers'][i].get(axis) for row in rows)), []).append(i)
    listed = lambda blocks: f'{len(blocks)} blocks' if len(blocks) > 8 else f'blocks {", ".join(map(str, blocks))}'
    label = lambda blocks: f'block {blocks[0]}' if len(blocks) == 1 else listed(blocks)
    return [(label(blocks), widths) for widths, blocks in groups.items()]


def _axis(axis: str, groups: Sequence[tuple[str, Widths]], rows: Sequence[Row], budgets: Sequence[str]) -> str:
    bars = ''
    for label, (full, *widths) in groups:
        nested = ''.join(
            f'<i class="{budget_colour(budgets, row["name"])}" style="--w:{100 * (width or 0) / full:.1f}%"></i>'
            for row, width in zip(rows, widths, strict=True)
        )
        texts = ['–' if width is None else str(width) for width in widths]
        tip = f'{axis} {label}: ' + ', '.join(f'{row["name"]} {text}' for row, text in zip(rows, texts, strict=True))
        bars += (
            f'<div class="bar" data-tip="{html.escape(tip)}"><span>{html.escape(label)}</span>'
            f'<em>{" · ".join(texts)}</em><div class="track">{nested}</div></div>'
        )
    return f'<div><h3>{html.escape(axis)}</h3>{bars}</div>'


def samples(log: RunLog) -> str:
    """What every budget writes after the same prompts."""
    if not log.of('samples'):
        return ''
    body, last = '', [line for line in log.of('samples') if line['step'] == log.of('samples')[-1]['step']]
    for prompt in dict.fromkeys(line['prompt'] for line in last):
        for line in (line for line in last if line['prompt'] == prompt):
            text = f'<mark>{html.escape(prompt)}</mark>{html.escape(line["text"])}'
            colour = budget_colour(log.budgets, line['budget'])
            body += f'<div class="sample {colour}"><b>{html.escape(line["budget"])}</b><pre>{text}</pre></div>'
    temperature = log.config.get('samples', {}).get('temperature', 0.0)
    how = f'drawn at temperature {temperature:g}, with the same seed' if temperature else 'greedy'
    note = f'What each size writes after the same prompts (in bold), {how}.'
    return section('Samples', f'<div class="samples">{body}</div>', note)
