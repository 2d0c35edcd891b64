"""Small SVG charts as strings: lines, stacked areas, scatter. Colours and text follow the page's CSS variables."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 40
Points = Sequence[tuple[float, float]]


class Frame:
    """Maps data to the chart's pixels and draws its axes."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, log_y: bool = False, pad: float = 0.05
    ):
        self.x_label, self.y_label, self.log_y = x_label, y_label, log_y
        values = [math.log10(y) for y in ys if y > 0] if log_y else list(ys)
        self.x0, self.x1 = _range(xs, 0.0 if x_label == 'step' else pad)
        self.y0, self.y1 = _range(values, pad)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(max(value, 1e-12)) if self.log_y else value
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def axes(self) -> str:
        parts = []
        for tick in _ticks(self.x0, self.x1):
            parts.append(
                f'<text class="tick" x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_short(tick)}</text>'
            )
        for tick in _ticks(self.y0, self.y1):
            value = 10**tick if self.log_y else tick
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>')
        parts.append(
            f'<text class="label" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(self.x_label)}</text>'
        )
        middle = (HEIGHT - BOTTOM + TOP) / 2
        parts.append(
            f'<text class="label" transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{html.escape(self.y_label)}</text>'
        )
        return ''.join(parts)

    def bands(self, bands: Sequence[tuple[str, float, float]]) -> str:
        """Named stretches of the x axis."""
        parts = []
        for n, (name, start, end) in enumerate(bands):
            left, right = self.x(max(start, self.x0)), self.x(min(end, self.x1))
            shade = ' shaded' if n % 2 else ''
            parts.append(
                f'<rect class="band{shade}" x="{left:.1f}" y="{TOP}" width="{max(0, right - left):.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            )
            parts.append(f'<text class="tick" x="{left + 4:.1f}" y="{TOP + 11}">{html.escape(name)}</text>')
        return ''.join(parts)


def chart(body: str, title: str) -> str:
    """An accessible SVG element that scales with the page."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{body}</svg>'


def lines(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    title: str,
    bands: Sequence[tuple[str, float, float]] = (),
    log_y: bool = False,
) -> str:
    """A line per series, coloured in the order given; the colour classes are c0, c1, …"""
    points = [point for own in series.values() for point in own if math.isfinite(point[1])]
    if not points:
        return ''
    frame = Frame([x for x, _ in points], [y for _, y in points], x_label, y_label, log_y)
    body = frame.bands(bands) + frame.axes()
    for n, (name, own) in enumerate(series.items()):
        path = ' '.join(f'{frame.x(x):.1f},{frame.y(y):.1f}' for x, y in own if math.isfinite(y))
        body += f'<polyline class="line c{n % 6}" points="{path}"><title>{html.escape(name)}</title></polyline>'
    return chart(body, title)


def stacked(shares: Sequence[tuple[float, Sequence[float]]], names: Sequence[str], title: str) -> str:
    """Shares that sum to one over time, stacked; the largest choice at the bottom."""
    frame = Frame([x for x, _ in shares], [0.0, 1.0], 'step', 'probability', pad=0.0)
    below = [0.0] * len(shares)
    body = ''
    for n, name in enumerate(names):
        above = [low + own[n] for low, (_, own) in zip(below, shares, strict=True)]
        top = [f'{frame.x(x):.1f},{frame.y(y):.1f}' for (x, _), y in zip(shares, above, strict=True)]
        bottom = [f'{frame.x(x):.1f},{frame.y(y):.1f}' for (x, _), y in zip(shares, below, strict=True)]
        body += f'<polygon class="area s{n % 6}" points="{" ".join(top + bottom[::-1])}"><title>{html.escape(str(name))}</title></polygon>'
        below = above
    return chart(body + frame.axes(), title)


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return low - pad * (high - low), high + pad * (high - low)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    for size, letter in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if abs(value) >= size:
            return f'{value / size:g}{letter}'
    return f'{value:.3g}'
