"""What is wrong with a config's keys and numbers, told before anything starts: a misspelt key would otherwise change nothing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from elastic_jax.arch import unknown_name
from elastic_jax.layout import Layout
from elastic_jax.train.config import default_config, stage

DTYPES = ('float32', 'bfloat16', 'float16')
# Their keys are names that the experiment chooses, or are looked at where they are read.
OPEN = ('budgets', 'widths', 'choices', 'stages', 'data', 'evaluators')
AT_LEAST_ONE = (
    *('log_every', 'max_bad_steps', 'loss_chunk', 'checkpoint.every', 'checkpoint.keep', 'choice_multiple', 'metric_context'),
    *(f'{section}.{key}' for section in ('calibrate', 'eval') for key in ('batches', 'batch_size', 'context')),
    *(f'layout.{field.name}' for field in dataclasses.fields(Layout)),
    'samples.tokens',
)
AT_LEAST_ZERO = (
    *('tolerance', 'calibrate.layer_batches', 'eval.every', 'samples.temperature'),
    *('router.weight', 'router.dead_zone', 'router.anchor'),
)
ABOVE_ZERO = ('router.lr', 'router.start_temperature', 'router.end_temperature')
# Of config.optimizer, and of what a stage has otherwise.
OPTIMIZER = {
    **dict.fromkeys(('final_lr', 'warmup', 'weight_decay', 'clip'), (lambda value: value >= 0, 'at least 0')),
    **dict.fromkeys(('b1', 'b2'), (lambda value: 0 <= value < 1, 'at least 0 and below 1')),
}
BOUNDS = (
    (AT_LEAST_ONE, lambda value: value >= 1, 'at least 1'),
    (AT_LEAST_ZERO, lambda value: value >= 0, 'at least 0'),
    (ABOVE_ZERO, lambda value: value > 0, 'above 0'),
)


def config_problems(config: ConfigDict) -> list[str]:
    """One sentence for each key that nothing reads, and for each number or dtype that cannot be."""
    known = default_config()
    problems = _unknown(config, known, 'config')
    for name, own in config.stages.items():
        whole = stage('elastic', 1, 1, 1)
        problems += _unknown(own, whole, f'config.stages.{name}')
        problems += _unknown(own.get('optimizer', {}), known.optimizer, f'config.stages.{name}.optimizer')
        problems += _optimizer(own.get('optimizer', {}), f'config.stages.{name}.optimizer')
    for section, defaults in known.items():
        if isinstance(defaults, ConfigDict) and section not in OPEN:
            problems += _unknown(config[section], defaults, f'config.{section}')
    for paths, good, bound in BOUNDS:
        for path in paths:
            value = config
            for key in path.split('.'):
                value = value[key]
            problems += _bounded(f'config.{path}', value, good, bound)
    problems += _optimizer(config.optimizer, 'config.optimizer') + _entries(config)
    if config.dtype not in DTYPES:
        problems.append(unknown_name('dtype', str(config.dtype), list(DTYPES)))
    return problems


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _bounded(where: str, value: Any, good: Callable[[float], bool], bound: str) -> list[str]:
    return [] if is_number(value) and good(value) else [f'{where}={value!r} must be {bound}']


def _optimizer(given: Mapping[str, Any], where: str) -> list[str]:
    found = (_bounded(f'{where}.{key}', given[key], *bound) for key, bound in OPTIMIZER.items() if key in given)
    return list(itertools.chain.from_iterable(found))


def _entries(config: ConfigDict) -> list[str]:
    """Of sections whose keys the experiment chooses: values of another kind than expected."""
    kinds = (
        ('budgets', config.budgets, is_number, 'a number: a share up to 1.0, or an absolute cost'),
        ('widths', config.widths, lambda own: isinstance(own, str), "a text, such as 'embed=96,mlp=256'"),
        ('plan.widths', config.plan.widths, lambda own: isinstance(own, str), "a text, such as 'embed=96,mlp=256'"),
        ('choices', config.choices, _is_numbers, 'a list of widths or shares, such as (1.0, 0.5)'),
    )
    problems = [
        f'config.{section}.{name}={value.to_dict() if isinstance(value, ConfigDict) else value!r} must be {expected}'
        for section, own, good, expected in kinds
        for name, value in own.items()
        if not good(value)
    ]
    if isinstance(config.samples.prompts, str) or not all(isinstance(prompt, str) for prompt in config.samples.prompts):
        problems.append(f'config.samples.prompts={config.samples.prompts!r} must be a list of texts')
    return problems


def _is_numbers(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_number, value))


def _unknown(given: ConfigDict, known: ConfigDict, where: str) -> list[str]:
    return [unknown_name(f'key in {where}', key, list(known)) for key in given if key not in known]
