"""The frontier of `elastic pareto` as a picture for slides."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elastic_jax.evaluate.charts import Scale, fit
from elastic_jax.evaluate.page import LIGHT
from elastic_jax.evaluate.pareto import INK, RULE, SOFT


class Row(Protocol):
    """What is drawn of a candidate."""

    frontier: bool
    name: str
    cost: float
    bits_per_byte: float


def frontier_png(
    rows: Sequence[Row], label: str, text_of: Callable[[float], str], parent_bits_per_byte: float | None, full_cost: float
) -> bytes:
    """All candidates, those that no other beats as a line, trained budgets by name, the parent. 1920 x 1080.

    Args:
      label: of the axis of costs. text_of: a cost as its tick says it.
    """
    figure = Figure(figsize=(12.8, 7.2), dpi=150, layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    costs = [row.cost for row in rows] + [full_cost]
    best = [row for row in rows if row.frontier]
    x = fit(costs, log=max(costs) > 8 * min(costs), pad=0.08)
    y = _scores(rows, best, parent_bits_per_byte)
    others = [(row.cost, row.bits_per_byte) for row in rows if not row.frontier and not row.name]
    if others:
        panel.scatter(*zip(*others, strict=True), s=42, color=SOFT, alpha=0.35, linewidths=0, label='other candidates', zorder=2)
    line = [(row.cost, row.bits_per_byte) for row in best]
    panel.plot(*zip(*line, strict=True), '-o', color=LIGHT[0], linewidth=2.6, markersize=8, label='frontier', zorder=3)
    near = {'textcoords': 'offset points', 'fontsize': 13, 'color': INK, 'fontweight': 'bold', 'zorder': 6}
    trained = [row for row in rows if row.name]
    for row in trained:
        panel.plot(row.cost, row.bits_per_byte, 'o', markersize=15, color=LIGHT[2], markeredgecolor='white', zorder=5)
        right = x.at(row.cost) > 85
        panel.annotate(
            row.name, (row.cost, row.bits_per_byte), xytext=(-12 if right else 12, 10), ha='right' if right else 'left', **near
        )
    if trained:
        panel.plot([], [], 'o', markersize=11, color=LIGHT[2], label='trained budgets')
    if parent_bits_per_byte is not None:
        panel.axhline(parent_bits_per_byte, color=INK, linewidth=1.3, linestyle=(0, (5, 4)), alpha=0.7, zorder=1)
        parent = f'parent {parent_bits_per_byte:.3f}'
        panel.plot(full_cost, parent_bits_per_byte, 'D', markersize=9, color=INK, markeredgecolor='white', label=parent, zorder=4)
    panel.set_title('Every size of one checkpoint', loc='left', fontsize=18, fontweight='bold', color=INK, pad=18)
    panel.set_ylabel('held-out bits per byte', color=SOFT, fontsize=14, labelpad=8)
    panel.set_xlabel(label, color=SOFT, fontsize=14, labelpad=8)
    if x.log:
        panel.set_xscale('log')
    panel.set_xlim(x.low, x.high)
    panel.set_ylim(y.low, y.high)
    panel.set_xticks(x.ticks(), [text_of(tick) for tick in x.ticks()])
    panel.set_yticks(y.ticks(), [f'{tick:g}' for tick in y.ticks()])
    _quiet(panel)
    figure.get_layout_engine().set(w_pad=0.25, h_pad=0.2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def _scores(rows: Sequence[Row], best: Sequence[Row], parent: float | None) -> Scale:
    """The scale of scores: candidates that are far off must not flatten the frontier."""
    shown = [row.bits_per_byte for row in rows if row.frontier or row.name] + ([parent] if parent is not None else [])
    most = max(shown) + 0.6 * (max(shown) - min(shown))
    return fit([*shown, *(row.bits_per_byte for row in rows if row.bits_per_byte <= most)], pad=0.1)


def _quiet(panel: Any) -> None:
    panel.minorticks_off()
    panel.tick_params(colors=SOFT, length=0, labelsize=13, pad=8)
    panel.grid(axis='y', color=RULE, linewidth=1)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
    panel.legend(frameon=False, fontsize=13, labelcolor=INK, loc='upper right')
