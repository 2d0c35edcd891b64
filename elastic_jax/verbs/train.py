"""elastic train: the main job."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from elastic_jax.verbs import flags
from elastic_jax.verbs.together import run_among_processes

SUMMARY = 'Run or resume an experiment; the same command goes on where it stopped.'
EXAMPLE = 'elastic train --config experiments/quickstart.py --workdir runs/quickstart --config.stages.search.steps=100'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.config(parser)
    parser.add_argument(
        '--workdir', required=True, help='where config, metrics, checkpoints and report go (any path, also gs://)'
    )


def run(arguments: argparse.Namespace) -> int:
    def work(config: Any) -> None:
        from elastic_jax.train.loop import train
        from elastic_jax.train.signals import Stopped

        try:
            train(config, arguments.workdir)
        except Stopped as stopped:
            print(f'elastic: {stopped}', file=sys.stderr)

    return run_among_processes(arguments, [f'--workdir={arguments.workdir}'], work)
