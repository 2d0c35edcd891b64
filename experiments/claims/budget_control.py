"""Elastic budget control: does it pay to think with one size and answer with another?

Shows: accuracy against measured latency for every pair (thinks, answers) of three nested sizes over limits of thinking, with the
answering size recomputing the thoughts or taking over the cache; the baseline is one size for both, as budget control is done
without nested sizes. The task (`chains.py`) is made on the spot; what is asked has numbers that were never trained on, and in
a second set a length that was never trained on either.

  python experiments/claims/budget_control.py --workdir runs/budget_control       trains, then measures; an hour on two cores

A training that was stopped goes on where it stopped. Results: WORKDIR/result.json and budget_control.png, and RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import elastic_jax
from elastic_jax.infer.budget_control import Control
from elastic_jax.infer.sizes import Sizes
from elastic_jax.train.config import default_config, stage
from elastic_jax.train.loop import train
from experiments.claims.chains import CLOSING, OPENING, Chain, chains, write_data

BUDGETS = {'full': 1.0, 'mid': 0.6, 'small': 0.3}
WIDTHS = {
    'mid': 'embed=144,mlp=384,mamba_heads=6',
    'small': 'embed=96,mlp=256,mamba_heads=4,query_heads=1',
}
TRAINED_LENGTHS, NEW_LENGTHS = (1, 2, 3, 4, 5, 7, 8), (6, 9)
LIMITS = (1, 4, 8, 16, 24, 40)
ROWS = 64  # questions answered together


def get_config(data: dict[str, dict[str, Any]], parent: str = '') -> ConfigDict:
    """A hybrid parent of 1.5 million parameters that learns to think; then three budgets of it, to answer.

    The budgets' widths are given by hand. They learn from the answers and not from the parent, which guesses at many of them, and
    take turns, one in a step.
    """
    config = default_config()
    config.name = 'budget_control'
    config.arch.update({'pattern': 'M*-M*-M*-', 'vocab': 264, 'embed': 192})
    config.arch.mamba.update({'heads': 8, 'head_dim': 32, 'groups': 2, 'state': 32, 'chunk': 64})
    config.arch.attention.update({'kv_heads': 2, 'query_heads': 2, 'head_dim': 48, 'rope': {'theta': 10000.0}})
    config.arch.mlp.update({'width': 512})
    config.budgets, config.widths = ConfigDict(BUDGETS), ConfigDict(WIDTHS)
    config.data.update(data['thinking'])
    config.optimizer.update({'lr': 1.5e-3, 'final_lr': 1e-4, 'warmup': 30})
    config.teacher = 'none'
    config.stages.pretrain = stage('pretrain', 2000, 256, 8, optimizer={'lr': 3e-3, 'final_lr': 3e-4, 'warmup': 50})
    shares = {'full': 0.4, 'mid': 0.3, 'small': 0.3}
    config.stages.elastic = stage('elastic', 3000, 256, 8, mode='sampled', probabilities=shares, data=data['answering'])
    config.curriculum = ('elastic',) if parent else ('pretrain', 'elastic')
    config.parent.checkpoint = parent
    config.calibrate.update({'batches': 4, 'batch_size': 16, 'context': 256, 'layer_batches': 0})
    config.eval.update({'every': 0, 'batches': 4, 'batch_size': 16, 'context': 256})
    config.checkpoint.update({'every': 500, 'keep': 2})
    return config


@dataclasses.dataclass(frozen=True)
class Setting:
    """Who thinks and who answers, how the one follows the other, and after how many tokens."""

    think: str
    answer: str
    switch: str
    limit: int

    @property
    def single(self) -> bool:
        return self.think == self.answer

    @property
    def control(self) -> Control:
        return Control(self.limit, 2, OPENING, CLOSING, self.switch)


@dataclasses.dataclass
class Point:
    """A setting's results. `right`: of each question; `seconds`: from the question to the whole answer, of ROWS together."""

    setting: Setting
    right: list[bool]
    seconds: float

    def accuracy(self, of: slice = slice(None)) -> float:
        return statistics.mean(self.right[of])


def settings() -> list[Setting]:
    """Every pair, limit and way of switching; one size for both has nothing to recompute."""
    pairs = [(think, answer) for think in BUDGETS for answer in BUDGETS]
    switches = lambda pair: ('hand-over',) if pair[0] == pair[1] else ('recompute', 'hand-over')
    return [Setting(*pair, switch, limit) for pair in pairs for switch in switches(pair) for limit in LIMITS]


def measure(sizes: Sizes, questions: list[Chain], rounds: int) -> list[Point]:
    """Accuracy over all questions, then the times of the first ROWS of them, all settings in turn, `rounds` times."""

    def run(setting: Setting, asked: list[Chain]) -> tuple[list[bool], float]:
        prompts = [chain.question for chain in asked]
        thoughts, timing = sizes.think(prompts, setting.think, setting.answer, setting.control)
        right = [thought.answer.text == chain.answer for thought, chain in zip(thoughts, asked, strict=True)]
        return right, timing.thinking + timing.switch + timing.answer

    parts = [questions[start : start + ROWS] for start in range(0, len(questions), ROWS)]
    right = {setting: [each for part in parts for each in run(setting, part)[0]] for setting in settings()}
    seconds: dict[Setting, list[float]] = {setting: [] for setting in right}
    for _ in range(rounds):
        for setting, found in seconds.items():
            found.append(run(setting, parts[0])[1])
    return [Point(setting, right[setting], statistics.median(seconds[setting])) for setting in right]


def gains(points: list[Point]) -> dict[str, Any]:
    """The largest gain in accuracy at equal latency, and the largest saving of latency at equal accuracy.

    Each is chosen by the even questions and reported on the odd ones, so that the best of many is no stroke of luck.
    """
    choose, report = slice(0, None, 2), slice(1, None, 2)
    single = [point for point in points if point.setting.single]
    mixed = [point for point in points if not point.setting.single]

    def rival(point: Point) -> Point:
        """The best single size that is no slower."""
        return max((s for s in single if s.seconds <= point.seconds), key=lambda s: s.accuracy(choose))

    def as_good(point: Point) -> Point | None:
        """The fastest single size that is no worse."""
        return min((s for s in single if s.accuracy(choose) >= point.accuracy(choose)), key=lambda s: s.seconds, default=None)

    show = lambda point: {
        **dataclasses.asdict(point.setting), 'accuracy': point.accuracy(report), 'milliseconds': 1e3 * point.seconds,
    }  # fmt: skip
    able = [point for point in mixed if point.seconds >= min(s.seconds for s in single)]
    best = max(able, key=lambda point: point.accuracy(choose) - rival(point).accuracy(choose))
    matched = [(point, as_good(point)) for point in mixed]
    fast, slow = max(((p, s) for p, s in matched if s), key=lambda pair: pair[1].seconds / pair[0].seconds)
    return {
        'equal_latency': {
            'pair': show(best), 'single': show(rival(best)), 'gain': best.accuracy(report) - rival(best).accuracy(report),
        },
        'equal_accuracy': {'pair': show(fast), 'single': show(slow), 'times_faster': slow.seconds / fast.seconds},
    }  # fmt: skip


def plot(found: dict[str, list[Point]], path: Path) -> None:
    """Accuracy against latency: single sizes as lines, pairs as markers."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(6.5 * len(found), 5), sharey=True, squeeze=False)
    for axes, (name, points) in zip(panels[0], found.items(), strict=True):
        for think in BUDGETS:
            for answer in BUDGETS:
                for switch, marker in (('recompute', 'o'), ('hand-over', 'x')):
                    own = [p for p in points if (p.setting.think, p.setting.answer, p.setting.switch) == (think, answer, switch)]
                    if not own:
                        continue
                    label = f'{think} alone' if think == answer else f'{think} → {answer}, {switch}'
                    style = {'linewidth': 2.5} if think == answer else {'marker': marker, 'linewidth': 0.7, 'alpha': 0.8}
                    axes.plot([1e3 * p.seconds for p in own], [p.accuracy() for p in own], label=label, **style)
        axes.set(title=name, xlabel=f'milliseconds for {ROWS} questions', ylabel='accuracy')
    panels[0][-1].legend(fontsize=7, loc='lower right')
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=Path, required=True)
    parser.add_argument('--chains', type=int, default=150_000, help='how many to train on')
    parser.add_argument('--questions', type=int, default=256, help='in each of the two sets')
    parser.add_argument('--rounds', type=int, default=3, help='of measuring time')
    parser.add_argument('--parent', default='', metavar='DIR', help='a checkpoint of the pretrain stage, not to train it again')
    arguments = parser.parse_args()
    data = write_data(arguments.workdir / 'data', TRAINED_LENGTHS, arguments.chains, seed=0)
    train(get_config(data, arguments.parent), arguments.workdir / 'run')

    sizes = elastic_jax.open_checkpoint(arguments.workdir / 'run').load_sizes()
    asked = {
        'new numbers': chains([length for length in TRAINED_LENGTHS if length > 2], arguments.questions, True, seed=1),
        'new numbers and lengths': chains(NEW_LENGTHS, arguments.questions, True, seed=2),
    }
    found, result = {}, {}
    for name, questions in asked.items():
        random.Random(3).shuffle(questions)
        found[name] = measure(sizes, questions, arguments.rounds)
        rows = [
            {**dataclasses.asdict(point.setting), 'accuracy': point.accuracy(), 'seconds': point.seconds} for point in found[name]
        ]
        result[name] = {'gains': gains(found[name]), 'points': rows}
        print(name, json.dumps(result[name]['gains'], indent=1))
        (arguments.workdir / 'result.json').write_text(json.dumps(result, indent=1))
        plot(found, arguments.workdir / 'budget_control.png')


if __name__ == '__main__':
    main()
