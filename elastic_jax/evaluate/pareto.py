"""Quality against size: the picture a run is for, as `pareto.png` for slides and as a chart of the page."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elastic_jax.evaluate.charts import Scale, fit, plot
from elastic_jax.evaluate.page import LIGHT, budget_colour
from elastic_jax.evaluate.summary import human, percent

Row = dict[str, Any]
SIZE, SCORE, BEFORE = 'parameters', 'bits_per_byte', 'before_bits_per_byte'
INK, SOFT, RULE = '#101828', '#5b6779', '#e3e8ef'
TITLES = ('Elastic training closes the gap', 'The sizes in one checkpoint')
CROWDED = 13.0  # percent of the width that a size's name needs


def was_cut(row: Row, parent: Row) -> bool:
    """Whether a budget is smaller than the parent: the full one starts where the parent is."""
    return row[SIZE] < parent[SIZE] and math.isfinite(row[BEFORE])


def spread_hides_the_frontier(rows: Sequence[Row], parent: Row) -> bool:
    """Whether the slices before training lie so far off that the budgets after it need a picture of their own."""
    after = [row[SCORE] for row in rows] + [parent[SCORE]]
    before = [row[BEFORE] for row in rows if was_cut(row, parent)]
    return bool(before) and max(before) - min(after) > 3 * (max(after) - min(after))


def drawable(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a finite score, smallest first."""
    return sorted((row for row in rows if math.isfinite(row[SCORE])), key=lambda row: row[SIZE])


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Of rows in order of size, those that no smaller one beats."""
    best, kept = math.inf, []
    for row in rows:
        if row[SCORE] < best:
            best = row[SCORE]
            kept.append(row)
    return kept


def scales(rows: Sequence[Row], parent: Row, with_before: bool) -> tuple[Scale, Scale]:
    """(sizes, scores) of a picture that holds all points."""
    sizes = [row[SIZE] for row in rows] + [parent[SIZE]]
    scores = [row[SCORE] for row in rows] + [parent[SCORE]]
    scores += [row[BEFORE] for row in rows if with_before and was_cut(row, parent)]
    y = fit(scores, pad=0.1)
    return fit(sizes, log=max(sizes) > 8 * min(sizes), pad=0.2), Scale(y.low - 0.04 * (y.high - y.low), y.high)


def size_ticks(rows: Sequence[Row], parent: Row, x: Scale) -> list[tuple[float, str, str, int]]:
    """(size, name, text, line) of every model on the axis of sizes; names too near each other go to further lines."""
    named = [(row[SIZE], row['name']) for row in rows]
    if all(size != parent[SIZE] for size, _ in named):
        named.append((parent[SIZE], 'parent'))
    ticks, ends = [], []
    for size, name in sorted(named):
        at = x.at(size)
        line = next((n for n, end in enumerate(ends) if at - end > CROWDED), len(ends))
        ends[line : line + 1] = [at]
        ticks.append((size, name, human(size), line))
    return ticks


def crowded(ticks: Sequence[tuple[float, str, str, int]]) -> bool:
    """Whether sizes lie so close that scores beside the points would overlap."""
    return any(line for _, _, _, line in ticks)


def pareto_png(rows: Sequence[Row], parent: Row) -> bytes:
    """The picture as a PNG, 1920 pixels wide where before and after need a panel each."""
    colours = {row['name']: LIGHT[n % len(LIGHT)] for n, row in enumerate(rows)}
    rows = drawable(rows)
    two = spread_hides_the_frontier(rows, parent)
    figure = Figure(figsize=(12.8, 6.2) if two else (9.6, 6.0), dpi=150, layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if two else 1, squeeze=False)[0]
    for panel, with_before, title in zip(panels, (True, False), TITLES, strict=False):
        _draw(panel, rows, parent, colours, with_before)
        panel.set_title(title, loc='left', fontsize=15, fontweight='bold', color=INK, pad=16)
    panels[0].set_ylabel('held-out bits per byte', color=SOFT, fontsize=11.5, labelpad=8)
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.18, wspace=0.05)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def _draw(panel: Any, rows: Sequence[Row], parent: Row, colours: dict[str, str], with_before: bool) -> None:
    x, y = scales(rows, parent, with_before)
    panel.axhline(parent[SCORE], color=INK, linewidth=1.3, linestyle=(0, (5, 4)), alpha=0.7, zorder=1)
    line = [(row[SIZE], row[SCORE]) for row in frontier(rows)]
    panel.plot(*zip(*line, strict=True), color=SOFT, linewidth=2.2, alpha=0.6, zorder=2)
    ticks = size_ticks(rows, parent, x)
    named = not with_before or not crowded(ticks)
    near = {'textcoords': 'offset points', 'fontsize': 12, 'color': INK}
    for row in rows:
        size, score, colour = row[SIZE], row[SCORE], colours[row['name']]
        if with_before and was_cut(row, parent):
            arrow = {'arrowstyle': '-|>', 'color': colour, 'lw': 2.2, 'alpha': 0.65, 'shrinkA': 8, 'shrinkB': 10}
            panel.annotate('', (size, score), (size, row[BEFORE]), arrowprops=arrow, zorder=3)
            panel.plot(
                size, row[BEFORE], 'o', color=colour, markersize=11, markerfacecolor='white', markeredgewidth=2.4, zorder=4
            )
            text = f'{row[BEFORE]:.2f}  only sliced'
            own = near | {'color': SOFT, 'fontsize': 11, 'bbox': {'facecolor': 'white', 'edgecolor': 'none', 'pad': 1.5}}
            panel.annotate(text, (size, row[BEFORE]), xytext=(12, 0), va='center', **own)
        panel.plot(size, score, 'o', color=colour, markersize=14, markeredgecolor='white', markeredgewidth=1.6, zorder=5)
        below = score < parent[SCORE]
        if named:
            panel.annotate(
                f'{score:.3f}', (size, score), xytext=(10, -9 if below else 9), va='top' if below else 'bottom', **near
            )
    panel.plot(parent[SIZE], parent[SCORE], 'D', markersize=8, color=INK, markeredgecolor='white', zorder=6)
    panel.annotate(f'parent {parent[SCORE]:.3f}', (x.low, parent[SCORE]), xytext=(4, -6), va='top', **near)
    if x.log:
        panel.set_xscale('log')
    panel.set_xlim(x.low, x.high)
    panel.set_ylim(y.low, y.high)
    panel.set_xticks([tick[0] for tick in ticks], [3 * line * '\n' + f'{name}\n{text}' for _, name, text, line in ticks])
    panel.set_yticks(y.ticks(), [f'{tick:g}' for tick in y.ticks()])
    panel.minorticks_off()
    panel.tick_params(colors=SOFT, length=0, labelsize=11, pad=7)
    for label, (_, name, _, _) in zip(panel.get_xticklabels(), ticks, strict=True):
        label.set(color=colours.get(name, INK), fontsize=12.5, fontweight='bold', linespacing=1.3)
    panel.grid(axis='y', color=RULE, linewidth=1)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)


def pareto_charts(rows: Sequence[Row], parent: Row, budgets: Sequence[str]) -> str:
    """The same as charts of the page."""
    rows = drawable(rows)
    figures = ''
    for with_before, title in zip((True, False), TITLES, strict=True):
        if with_before or spread_hides_the_frontier(rows, parent):
            figures += f'<figure><h3>{title}</h3>{_chart(rows, parent, budgets, with_before)}</figure>'
    return f'<div class="pair">{figures}</div>'


def _chart(rows: Sequence[Row], parent: Row, budgets: Sequence[str], with_before: bool) -> str:
    x, y = scales(rows, parent, with_before)
    place = lambda size, score: f'style="left:{x.at(size):.2f}%;bottom:{y.at(score):.2f}%"'
    point = lambda size, score: f'{x.at(size):.2f} {100 - y.at(score):.2f}'
    line = 'M' + 'L'.join(point(row[SIZE], row[SCORE]) for row in frontier(rows))
    marks = f'<path class="level" d="M{point(x.low, parent[SCORE])}H100"/><path class="frontier" d="{line}"/>'
    ticks = size_ticks(rows, parent, x)
    over = f'<span class="levelname under" {place(x.low, parent[SCORE])}>parent <b>{parent[SCORE]:.3f}</b></span>'
    for row in rows:
        size, score, colour = row[SIZE], row[SCORE], budget_colour(budgets, row['name'])
        tip = html.escape(f'{row["name"]}: {human(size)} parameters, {percent(size / parent[SIZE])} of the parent’s')
        if with_before and was_cut(row, parent):
            marks += f'<path class="arrow {colour}" d="M{point(size, row[BEFORE])}L{point(size, score)}"/>'
            over += f'<i class="dot open {colour}" {place(size, row[BEFORE])} data-tip="{tip}, only sliced"></i>'
            over += f'<span class="beside" {place(size, row[BEFORE])}>{row[BEFORE]:.2f}<small> only sliced</small></span>'
        over += f'<i class="dot {colour}" {place(size, score)} data-tip="{tip}"></i>'
        if not with_before or not crowded(ticks):
            over += f'<span class="value{" under" if score < parent[SCORE] else ""}" {place(size, score)}>{score:.3f}</span>'
    over += f'<i class="dot p" {place(parent[SIZE], parent[SCORE])} data-tip="parent: {human(parent[SIZE])} parameters"></i>'
    names, lines = '', 0
    for size, name, text, line_number in ticks:
        lines = max(lines, line_number)
        style = f'left:{x.at(size):.2f}%;margin-top:{2.6 * line_number:.1f}em'
        names += f'<span class="size {budget_colour(budgets, name)}" style="{style}"><b>{html.escape(name)}</b>{text}</span>'
    title = 'held-out bits per byte against parameters'
    chart = plot(marks, x, y, title, y_label='held-out bits per byte', over=over + names, size='tall', x_ticks=())
    return f'<div style="padding-bottom:{1.4 + 2.6 * lines:.1f}em">{chart}</div>'
