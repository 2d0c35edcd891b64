"""elastic train: the main job."""

from __future__ import annotations

import argparse
import os
import sys

from elastic_jax.verbs import flags

SUMMARY = 'Run or resume an experiment; the same command goes on where it stopped.'
EXAMPLE = 'elastic train --config experiments/quickstart.py --workdir runs/quickstart --config.stages.search.steps=100'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.config(parser)
    parser.add_argument(
        '--workdir', required=True, help='where config, metrics, checkpoints and report go (any path, also gs://)'
    )


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.parallel.environment import platform_of
    from elastic_jax.parallel.supervise import is_supervised, supervise

    if platform_of(os.environ) is not None and not is_supervised(os.environ):
        # One process of several: when JAX ends it because another was lost, its parent says so.
        same = ['train', f'--config={arguments.config}', f'--workdir={arguments.workdir}', *arguments.overrides]
        return supervise([(None, [sys.executable, '-m', 'elastic_jax', *same], {})])
    return _train(arguments)


def _train(arguments: argparse.Namespace) -> int:
    from elastic_jax.config_file import load_config
    from elastic_jax.parallel.distributed import among_processes
    from elastic_jax.parallel.processes import introduce, is_main, together
    from elastic_jax.train.loop import train
    from elastic_jax.train.signals import Stopped

    with among_processes() as joined:
        if joined:
            hosts = introduce()
            if is_main():
                print(f'{len(hosts)} processes on {", ".join(dict.fromkeys(hosts))}', file=sys.stderr)
        load = lambda: load_config(arguments.config, arguments.overrides)
        # Alone, nothing of JAX is asked for before the config is read.
        config = together(load) if joined else load()
        try:
            train(config, arguments.workdir)
        except Stopped as stopped:
            print(f'elastic: {stopped}', file=sys.stderr)
    return 0
