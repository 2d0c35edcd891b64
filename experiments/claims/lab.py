"""What the claims share: one parent, arms that are ordinary training runs from it, and a JSON file for every finished run.

An arm is a config of `elastic train` that starts from the parent's checkpoint, so it resumes by itself when killed; arms that
several claims have in common run once. All arms of a setting see the same number of tokens, in an order that the seed decides,
and are scored on the same held-out text at every eighth of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import parent
from ml_collections import ConfigDict

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.restore import read_manifest
from elastic_jax.cost import parameters
from elastic_jax.errors import UserError
from elastic_jax.evaluate.summary import format_widths
from elastic_jax.metrics import read_metrics
from elastic_jax.train.config import default_config, stage
from elastic_jax.train.flops import stage_flops
from elastic_jax.train.loop import train
from elastic_jax.train.setup import make_plan

BUDGETS = {'full': 1.0, 'mid': 0.7, 'small': 0.45}
# Steps, context and batch of an arm; learning rates of what starts from the parent and of what starts from nothing.
RUNS = {'': (128, 256, 8), 'long': (128, 256, 8), 'medium': (192, 256, 8), 'large': (2000, 512, 16), 'smoke': (12, 64, 4)}
TUNED, FRESH = {'lr': 1e-3, 'final_lr': 1e-4, 'warmup': 10}, {'lr': 4e-3, 'final_lr': 4e-4, 'warmup': 10}
Build = Callable[['Setting', ConfigDict], None]


class Setting:
    """One size of the experiment: its parent, and what an arm's config has in common with the others.

    Attributes:
      arch: the parent's. steps, context, batch_size: of an arm.
    """

    def __init__(self, size: str, out: Path):
        self.size, self.out, self.parent = size, out, out / 'parent'
        if not (self.parent / 'report.html').exists():  # written last
            train(self._cached(parent.get_config(size)), self.parent)
        self.arch = read_manifest(self.parent).arch
        self.steps, self.context, self.batch_size = RUNS[size]

    @property
    def parameters(self) -> float:
        return parameters(self.arch)

    def _cached(self, config: ConfigDict) -> ConfigDict:
        # Arms of the same shapes and other seeds are the same programs.
        config.compilation_cache = str((self.out / 'compiled').resolve())
        return config

    def config(self, name: str, seed: int) -> ConfigDict:
        """All budgets every step on uniform widths set by hand, distilled from the frozen parent: what arms change."""
        config = default_config()
        config.name, config.seed = name, seed
        config.parent.checkpoint = str(self.parent)
        config.budgets = ConfigDict(BUDGETS)
        config.widths.update({name: self.uniform(share) for name, share in BUDGETS.items() if share < 1})
        config.optimizer.update(TUNED)
        config.curriculum = ('elastic',)
        config.stages.elastic = stage('elastic', self.steps, self.context, self.batch_size)
        config.calibrate.update({'batches': 4, 'batch_size': 8, 'context': 256, 'layer_batches': 0})
        config.eval.update({'every': max(1, self.steps // 8), 'batches': 4, 'batch_size': 8, 'context': 256})
        config.checkpoint.update({'every': max(40, self.steps // 8), 'keep': 1})
        return self._cached(config)

    def uniform(self, share: float) -> str:
        """Widths in one proportion on every axis, nearest to a share of the parent's parameters; as config.widths has them."""
        archs = [self._proportional(part / 32) for part in range(8, 32)]
        best = min(archs, key=lambda arch: abs(parameters(arch) / self.parameters - share))
        own = best.widths()
        return format_widths({axis: own[axis] for axis in ('embed', 'mlp', 'mamba_heads')})

    def _proportional(self, ratio: float) -> Arch:
        groups = next(mixer.groups for mixer in self.arch.mixers if hasattr(mixer, 'groups'))
        own = self.arch.widths()
        heads = max(1, round(own['mamba_heads'] * ratio / groups)) * groups
        return self.arch.narrow(embed=round(own['embed'] * ratio), mlp=round(own['mlp'] * ratio), mamba_heads=heads)


def alone(budget: str, **changes: Any) -> Build:
    """Trains one budget only. `scratch`: from random weights of its own; `teacher`: 'frozen', or 'none' for cross-entropy;
    `longer`: so many times the steps."""

    def build(setting: Setting, config: ConfigDict) -> None:
        keep_budgets(config, 'full', budget)
        config.stages.elastic.probabilities = ConfigDict({budget: 1.0}, convert_dict=False)
        config.stages.elastic.steps *= changes.get('longer', 1)
        config.eval.every *= changes.get('longer', 1)
        config.teacher = changes.get('teacher', 'frozen')
        if changes.get('scratch'):
            config.parent.scratch = budget
            config.optimizer.update(FRESH)

    return build


def keep_budgets(config: ConfigDict, *names: str) -> None:
    config.budgets = ConfigDict({name: config.budgets[name] for name in names})
    config.widths = ConfigDict({name: text for name, text in config.widths.items() if name in names}, convert_dict=False)


def nested(**changes: Any) -> Build:
    """All budgets together; `changes` set keys of the stage, and `teacher` and `order` those of the config."""

    def build(setting: Setting, config: ConfigDict) -> None:
        own = dict(changes)
        config.teacher = own.pop('teacher', 'frozen')
        config.calibrate.order = own.pop('order', 'importance')
        for key, value in own.items():
            config.stages.elastic[key] = ConfigDict(value, convert_dict=False) if isinstance(value, dict) else value

    return build


def searched(per_layer: tuple[str, ...] = ()) -> Build:
    """Widths found by the router in the first quarter of the tokens; static slices in the rest."""

    def build(setting: Setting, config: ConfigDict) -> None:
        shares = tuple(eighths / 8 for eighths in range(8, 2, -1))
        config.widths = ConfigDict(convert_dict=False)
        config.choices.update({'embed': shares, 'mlp': shares, 'mamba_heads': (1.0, 0.75, 0.5)})
        config.per_layer = per_layer
        search, whole = setting.steps // 4, config.stages.elastic
        config.stages.search = stage('search', search, whole.context, whole.batch_size, per_step=1)
        whole.steps -= search
        config.curriculum = ('search', 'elastic')

    return build


def read_result(setting: Setting, name: str, seed: int) -> dict[str, Any]:
    """The result of a finished arm. Raises UserError when it has not run."""
    path = setting.out / 'results' / f'{name}-{seed}.json'
    if not path.exists():
        raise UserError(f'{path} is not there yet; run the arm {name} first')
    return json.loads(path.read_text())


def run_arm(setting: Setting, name: str, build: Build, seed: int) -> dict[str, Any]:
    """Trains an arm, or goes on with it, and returns its result; a finished one is read from its JSON file."""
    path = setting.out / 'results' / f'{name}-{seed}.json'
    if path.exists():
        return read_result(setting, name, seed)
    config = setting.config(name, seed)
    build(setting, config)
    begun, workdir = time.time(), setting.out / 'arms' / f'{name}-{seed}'
    train(config, workdir)
    lines = list(read_metrics(workdir))
    final = next(line for line in reversed(lines) if line['kind'] == 'final')
    tokens = setting.context * setting.batch_size
    plan = make_plan(config)
    trained = _trained(config)
    result = {
        'arm': name,
        'seed': seed,
        'size': setting.size,
        'tokens': plan.steps * tokens,
        'flops': sum(stage_flops(plan, own) for own in plan.stages),
        'seconds': round(time.time() - begun, 1),
        'parent': final['parent']['bits_per_byte'],
        'budgets': {
            row['name']: {
                'widths': row['widths'],
                'parameters': row['parameters'],
                'before': row['before_bits_per_byte'],
                'bits_per_byte': row['bits_per_byte'],
                'curve': [
                    (line['step'] * tokens, line['bits_per_byte'])
                    for line in lines
                    if line['kind'] == 'eval' and line['budget'] == row['name']
                ]
                + [(plan.steps * tokens, row['bits_per_byte'])],
            }
            for row in final['rows']
            if row['name'] in trained
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(result, indent=1))
    temporary.replace(path)
    return result


def _trained(config: ConfigDict) -> set[str]:
    given = dict(config.stages.elastic.probabilities)
    return {name for name in config.budgets if not given or given.get(name)}


def main(arms: Mapping[str, Build], page: str) -> None:
    """The command line of a claim's script."""
    parser = argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', default='0,1,2', help='comma-separated (default: 0,1,2)')
    parser.add_argument('--size', default='', choices=tuple(RUNS), help="default: ''; large for a GPU, smoke for a minute")
    parser.add_argument('--out', default='runs/claims', help='parent, arms and results go here (default: runs/claims)')
    parser.add_argument('--arms', help='comma-separated: only these of ' + ', '.join(arms))
    given = parser.parse_args()
    chosen = given.arms.split(',') if given.arms else list(arms)
    try:
        run_all({name: arms[name] for name in chosen}, [int(seed) for seed in given.seeds.split(',')], given.size, given.out)
    except KeyError as error:
        sys.exit(f'unknown arm {error}; known: {", ".join(arms)}')
    except UserError as error:
        sys.exit(f'{sys.argv[0]}: {error}')


def run_all(arms: Mapping[str, Build], seeds: list[int], size: str, out: str) -> None:
    """Every arm with every seed; seed by seed, so that each is complete before the next begins."""
    setting = Setting(size, Path(out) / (size or 'default'))
    for seed in seeds:
        for name, build in arms.items():
            result = run_arm(setting, name, build, seed)
            scores = ', '.join(f'{budget} {own["bits_per_byte"]:.4f}' for budget, own in result['budgets'].items())
            print(f'{name}, seed {seed}: {scores} bits per byte, {result["seconds"]:.0f} s', file=sys.stderr, flush=True)
