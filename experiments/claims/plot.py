"""The claims' tables (Markdown, on stdout) and pictures from the results that are there.

  python experiments/claims/plot.py --out runs/claims --plots experiments/claims/plots

Every figure is a mean over seeds, with the smallest and largest; a claim with no result is left out.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run import CLAIMS

COLOURS = ('#2563eb', '#ea580c', '#059669', '#a21caf', '#64748b')
INK, SOFT, RULE = '#101828', '#5b6779', '#e3e8ef'
Results = dict[str, list[dict[str, Any]]]  # arm -> a result of each seed


def read_results(folder: Path) -> Results:
    """The results of every arm that has run, in order of seed."""
    results: Results = {}
    for path in sorted((folder / 'results').glob('*.json')):
        result = json.loads(path.read_text())
        results.setdefault(result['arm'], []).append(result)
    return results


def scores(runs: Sequence[dict[str, Any]], budget: str) -> np.ndarray:
    return np.asarray([run['budgets'][budget]['bits_per_byte'] for run in runs if budget in run['budgets']])


def tokens_to(curve: Sequence[Sequence[float]], target: float) -> float:
    """Tokens after which a curve of (tokens, score) first reaches a score, on the line between the points; inf: never."""
    before = None
    for tokens, score in curve:
        if score <= target:
            if before is None:
                return float(tokens)
            (old_tokens, old_score) = before
            return old_tokens + (tokens - old_tokens) * (old_score - target) / (old_score - score)
        before = (tokens, score)
    return float('inf')


def table(arms: Sequence[str], results: Results) -> str:
    """One row an arm: tokens, FLOPs, seconds, and every budget's bits per byte."""
    budgets = [name for name in ('full', 'mid', 'small') if any(len(scores(results[arm], name)) for arm in arms)]
    head = ['arm', 'seeds', 'M tokens', 'TFLOP', 'seconds', *budgets]
    lines = ['| ' + ' | '.join(head) + ' |', '|---|' + '---:|' * (len(head) - 1)]
    for arm in arms:
        runs = results[arm]
        mean = lambda key, runs=runs: float(np.mean([run[key] for run in runs]))
        cells = [
            f'`{arm}`',
            str(len(runs)),
            f'{mean("tokens") / 1e6:.2f}',
            f'{mean("flops") / 1e12:.1f}',
            f'{mean("seconds"):.0f}',
        ]
        for budget in budgets:
            found = scores(runs, budget)
            cells.append(f'{found.mean():.4f} ({found.min():.4f}–{found.max():.4f})' if len(found) else '')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def speedups(arms: Sequence[str], results: Results, budget: str = 'small') -> list[str]:
    """For every other arm: its tokens over those after which `nested`, with the same seed, is as good as it is at its end."""
    lines = []
    nested = {run['seed']: run for run in results.get('nested', ())}
    for arm in arms:
        ratios = [
            run['tokens'] / tokens_to(nested[run['seed']]['budgets'][budget]['curve'], run['budgets'][budget]['bits_per_byte'])
            for run in results[arm]
            if arm != 'nested' and run['seed'] in nested and budget in run['budgets']
        ]
        if ratios and min(ratios) > 0:
            lines.append(f'- tokens to equal loss, `{arm}` / `nested`: {_spread(ratios)}')
        elif ratios:
            lines.append(
                f'- `nested` does not reach the loss of `{arm}` with its tokens (in {ratios.count(0.0)} of {len(ratios)})'
            )
    return lines


def _spread(values: Sequence[float]) -> str:
    return f'{np.mean(values):.2f} ({min(values):.2f}–{max(values):.2f})'


def picture(arms: Sequence[str], results: Results, title: str, parent: float) -> Figure:
    """Curves over tokens for every budget, one panel each, seeds thin and their mean thick."""
    budgets = [name for name in ('full', 'mid', 'small') if any(len(scores(results[arm], name)) for arm in arms)]
    figure = Figure(figsize=(4.4 * len(budgets) + 0.6, 4.6), dpi=130, layout='constrained', facecolor='white')
    FigureCanvasAgg(figure)
    for panel, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        ends = []
        for colour, arm in zip(COLOURS, arms, strict=False):
            curves = [run['budgets'][budget]['curve'] for run in results[arm] if budget in run['budgets']]
            if not curves:
                continue
            points = np.asarray([curve[: min(map(len, curves))] for curve in curves])
            for curve in points:
                panel.plot(curve[:, 0] / 1e6, curve[:, 1], color=colour, linewidth=0.8, alpha=0.35)
            mean = points.mean(0)
            panel.plot(mean[:, 0] / 1e6, mean[:, 1], color=colour, linewidth=2.2, label=arm)
            ends += [mean[-1, 1], mean[len(mean) // 3, 1]]
        panel.axhline(parent, color=INK, linewidth=1.1, linestyle=(0, (5, 4)), alpha=0.7)
        panel.set_title(budget, loc='left', fontsize=12.5, fontweight='bold', color=INK)
        panel.set_xlabel('million tokens', color=SOFT)
        low, high = min([*ends, parent]), max([*ends, parent])
        panel.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        panel.grid(axis='y', color=RULE)
        panel.tick_params(colors=SOFT, length=0)
        panel.spines[:].set_visible(False)
    figure.axes[0].set_ylabel('held-out bits per byte (dashed: parent)', color=SOFT)
    figure.axes[-1].legend(frameon=False, fontsize=9.5)
    figure.suptitle(textwrap.fill(title, 44 * len(budgets)), x=0.01, ha='left', fontsize=14, fontweight='bold', color=INK)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='runs/claims', help='as of run.py')
    parser.add_argument('--size', default='default', help='the folder in it (default: default)')
    parser.add_argument('--plots', default='experiments/claims/plots', help='folder of the pictures')
    given = parser.parse_args()
    results = read_results(Path(given.out) / given.size)
    Path(given.plots).mkdir(parents=True, exist_ok=True)
    for number, claim in CLAIMS.items():
        arms = [arm for arm in claim.ARMS if arm in results]
        if len(arms) < 2:
            continue
        title = claim.__doc__.partition('\n')[0]
        print(f'### {title}\n\n{table(arms, results)}\n')
        print('\n'.join(speedups(arms, results)) + '\n' if 'nested' in arms else '')
        parent = results[arms[0]][0]['parent']
        picture(arms, results, title, parent).savefig(Path(given.plots) / f'claim_{number}.png')


if __name__ == '__main__':
    main()
