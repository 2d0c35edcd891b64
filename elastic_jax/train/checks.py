"""What is wrong with a config's keys and numbers, told before anything starts: a misspelt key would otherwise change nothing."""

from __future__ import annotations

from ml_collections import ConfigDict

from elastic_jax.arch import unknown_name
from elastic_jax.train.config import default_config, stage

DTYPES = ('float32', 'bfloat16', 'float16')
# Their keys are names that the experiment chooses, or are looked at where they are read.
OPEN = ('budgets', 'widths', 'choices', 'stages', 'data', 'evaluators')
AT_LEAST_ONE = (
    *('log_every', 'max_bad_steps', 'loss_chunk', 'checkpoint.every', 'checkpoint.keep'),
    *(f'{section}.{key}' for section in ('calibrate', 'eval') for key in ('batches', 'batch_size', 'context')),
)


def config_problems(config: ConfigDict) -> list[str]:
    """One sentence for each key that nothing reads, and for each number or dtype that cannot be."""
    known = default_config()
    problems = _unknown(config, known, 'config')
    for name, own in config.stages.items():
        whole = stage('elastic', 1, 1, 1)
        problems += _unknown(own, whole, f'config.stages.{name}')
        problems += _unknown(own.get('optimizer', {}), known.optimizer, f'config.stages.{name}.optimizer')
    for section, defaults in known.items():
        if isinstance(defaults, ConfigDict) and section not in OPEN:
            problems += _unknown(config[section], defaults, f'config.{section}')
    for path in AT_LEAST_ONE:
        value = config
        for key in path.split('.'):
            value = value[key]
        if value < 1:
            problems.append(f'config.{path}={value} must be at least 1')
    if config.dtype not in DTYPES:
        problems.append(unknown_name('dtype', str(config.dtype), list(DTYPES)))
    return problems


def _unknown(given: ConfigDict, known: ConfigDict, where: str) -> list[str]:
    return [unknown_name(f'key in {where}', key, list(known)) for key in given if key not in known]
