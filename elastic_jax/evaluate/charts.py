"""Charts as HTML: the marks in an SVG that stretches with the page, ticks and labels in HTML so that text never shrinks.

Positions are percentages of the plot, x from the left and y from the bottom. Colours are CSS classes of `page.py`, so charts
follow light and dark. The data of a chart lies beside it as JSON; the page's script reads it for the tooltips.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from typing import Any

Points = Sequence[tuple[float, float]]
MAX_POINTS = 300


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps values to percent of the plot; logarithmic scales clamp what is below `low`."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(x) for x in (self.low, self.high, max(value, self.low))) if self.log else (
            self.low, self.high, value
        )  # fmt: skip
        return 100.0 * (value - low) / (high - low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):
                ticks = [factor * 10.0**decade for decade in decades for factor in factors]
                ticks = [tick for tick in ticks if self.low <= tick <= self.high]
                if len(ticks) <= count + 2:
                    break
            return ticks[:: -(-len(ticks) // (count + 2)) or 1]
        rough = (self.high - self.low) / count
        step = 10.0 ** math.floor(math.log10(rough))
        step *= next(factor for factor in (1, 2, 5, 10) if rough <= step * factor * 1.0001)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) for k in range(first, last + 1)]


def fit(values: Sequence[float], log: bool = False, pad: float = 0.06) -> Scale:
    """The scale that holds all finite values, with `pad` of its length to spare on both sides."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(values), max(values)
    if log:
        low = max(low, high * 1e-4)
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    spare = pad * (high - low)
    low, high = low - spare, high + spare
    return Scale(10.0**low, 10.0**high, True) if log else Scale(low, high)


@dataclasses.dataclass(frozen=True)
class Series:
    """One line: its segments are drawn apart (a stage each). `faint` is the same before smoothing."""

    name: str
    colour: str
    segments: Sequence[Points]
    faint: Sequence[Points] = ()

    @property
    def points(self) -> list[tuple[float, float]]:
        return [point for segment in self.segments for point in segment]


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most about `most` points, evenly taken; the last one stays."""
    step = -(-len(points) // most) if points else 1
    return list(points) if step == 1 else [*points[:-1:step], points[-1]]


def plot(
    marks: str,
    x: Scale,
    y: Scale,
    title: str,
    *,
    x_label: str = '',
    y_label: str = '',
    over: str = '',
    bands: Sequence[tuple[str, float, float]] = (),
    data: Any = None,
    size: str = '',
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_ticks: Sequence[tuple[float, str]] | None = None,
) -> str:
    """A chart's frame around `marks` (SVG in percent, y downwards) and `over` (HTML placed in percent)."""
    x_ticks = [(tick, short(tick)) for tick in x.ticks()] if x_ticks is None else x_ticks
    y_ticks = [(tick, short(tick)) for tick in y.ticks()] if y_ticks is None else y_ticks
    parts = [f'<div class="chart {size}" role="img" aria-label="{html.escape(title)}">']
    if y_label:
        parts.append(f'<div class="ylabel">{html.escape(y_label)}</div>')
    parts.append('<div class="plot">')
    for n, (name, start, end) in enumerate(bands):
        left, right = max(0.0, x.at(start)), min(100.0, x.at(end))
        if right > left:
            style = f'left:{left:.2f}%;width:{right - left:.2f}%'
            parts.append(f'<div class="band{" shaded" if n % 2 else ""}" style="{style}"><span>{html.escape(name)}</span></div>')
    grid = ''.join(f'M0 {100 - y.at(tick):.2f}H100' for tick, _ in y_ticks)
    parts.append(f'<svg viewBox="0 0 100 100" preserveAspectRatio="none"><path class="grid" d="{grid}"/>{marks}</svg>{over}')
    parts += [f'<span class="ytick" style="bottom:{y.at(tick):.2f}%">{html.escape(text)}</span>' for tick, text in y_ticks]
    parts += [f'<span class="xtick" style="left:{x.at(tick):.2f}%">{html.escape(text)}</span>' for tick, text in x_ticks]
    parts.append('</div>')
    if x_label:
        parts.append(f'<div class="xlabel">{html.escape(x_label)}</div>')
    if data is not None:
        packed = json.dumps({'x0': x.low, 'x1': x.high, **data}, separators=(',', ':')).replace('<', '\\u003c')
        parts.append(f'<script type="application/json">{packed}</script>')
    return ''.join(parts) + '</div>'


def lines(
    series: Sequence[Series],
    title: str,
    *,
    x: Scale | None = None,
    y_label: str = '',
    log: bool = False,
    bands: Sequence[tuple[str, float, float]] = (),
    level: tuple[str, float] | None = None,
) -> str:
    """Lines over training steps. `level` is a named horizontal line to compare with."""
    own_x = [point[0] for one in series for point in one.points]
    x = x or fit(own_x, pad=0.0)
    shown = [point[1] for one in series for point in one.points] + ([level[1]] if level else [])
    for one in series:
        # A single wild step must not flatten the rest.
        faint = sorted(point[1] for part in one.faint for point in part if math.isfinite(point[1]))
        shown += faint[len(faint) // 20 : len(faint) - len(faint) // 20]
    y = fit(shown, log)
    marks, over, data = '', '', []
    if level:
        marks += f'<path class="level" d="M0 {100 - y.at(level[1]):.2f}H100"/>'
        over += f'<span class="levelname" style="bottom:{y.at(level[1]):.2f}%">{html.escape(level[0])}</span>'
    for one in series:
        marks += ''.join(f'<path class="faint {one.colour}" d="{_path(thin(part), x, y)}"/>' for part in one.faint)
    for one in series:
        marks += ''.join(f'<path class="line {one.colour}" d="{_path(thin(part), x, y)}"/>' for part in one.segments)
        points = [point for part in one.segments for point in thin(part) if math.isfinite(point[1])]
        data.append({'n': one.name, 'c': one.colour, 'x': [p[0] for p in points], 'y': [float(f'{p[1]:.4g}') for p in points]})
    return plot(marks, x, y, title, x_label='step', y_label=y_label, bands=bands, over=over, data={'series': data})


def stacked(steps: Sequence[float], shares: Sequence[Sequence[float]], names: Sequence[str], colour: str, title: str) -> str:
    """Shares that sum to one over time, as stacked areas, the first at the bottom and darkest; [steps][choices]."""
    kept = thin(list(zip(steps, shares, strict=True)), 120)
    x, y = fit([step for step, _ in kept], pad=0.0), Scale(0.0, 1.0)
    below, marks = [0.0] * len(kept), ''
    for n in range(len(names)):
        above = [low + own[n] for low, (_, own) in zip(below, kept, strict=True)]
        top = _path([(step, value) for (step, _), value in zip(kept, above, strict=True)], x, y)
        bottom = _path([(step, value) for (step, _), value in zip(kept, below, strict=True)][::-1], x, y)
        marks += f'<path class="area {colour}" style="fill-opacity:{shade(n, len(names)):.2f}" d="{top}L{bottom[1:]}Z"/>'
        below = above
    xs = [step for step, _ in kept]
    ys = [[float(f'{own[n]:.3g}') for _, own in kept] for n in range(len(names))]
    data = [{'n': name, 'c': colour, 'x': xs, 'y': own} for name, own in zip(names, ys, strict=True)]
    x_ticks = [(xs[0], short(xs[0])), (xs[-1], short(xs[-1]))] if len(xs) > 1 else [(xs[0], short(xs[0]))]
    return plot(
        marks, x, y, title, data={'series': data, 'share': 1}, size='small', x_ticks=x_ticks, y_ticks=[(0, '0'), (1, '1')]
    )


def shade(n: int, count: int) -> float:
    """Opacity of the n-th of `count` ordered choices: the first is solid."""
    return 1.0 if count == 1 else 1.0 - 0.75 * n / (count - 1)


def _path(points: Points, x: Scale, y: Scale) -> str:
    """The 'd' of a line through the points; a non-finite one interrupts it."""
    parts, pen = [], 'M'
    for step, value in points:
        if math.isfinite(value):
            parts.append(f'{pen}{x.at(step):.2f} {100 - y.at(value):.2f}')
        pen = 'L' if math.isfinite(value) else 'M'
    return ''.join(parts)


def short(value: float) -> str:
    """A tick's text."""
    for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size:
            return f'{value / size:.4g}{letter}'
    return f'{value:.3g}'
