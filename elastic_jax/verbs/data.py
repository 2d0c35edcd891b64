"""elastic data: what a config trains on."""

from __future__ import annotations

import argparse
import sys

from elastic_jax.errors import UserError
from elastic_jax.verbs import flags

SUMMARY = 'Show what a config trains on: samples, counts of every source, damaged lines, how full rows are, tokens per second.'
EXAMPLE = 'elastic data --config experiments/quickstart.py --config.data.path="texts/*.jsonl" --stage long'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.config(parser)
    parser.add_argument('--stage', help='only this stage of the curriculum (default: all, with samples of the first)')
    parser.add_argument('--samples', type=int, default=2, help='rows to show (default: 2)')
    parser.add_argument('--tokens', type=int, default=400, help='at most so many tokens of each row (default: 400)')
    parser.add_argument('--seconds', type=float, default=1.0, help='how long speed is measured, for each stage (default: 1)')
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.arch import unknown_name
    from elastic_jax.config_file import load_config
    from elastic_jax.data.show import describe, render
    from elastic_jax.terminal import json_text, shows_colour
    from elastic_jax.train.stage_data import stages_data

    stages = stages_data(load_config(arguments.config, arguments.overrides))
    if arguments.stage:
        found = [stage for stage in stages if stage.name == arguments.stage]
        if not found:
            raise UserError(unknown_name('stage', arguments.stage, [stage.name for stage in stages]))
        stages = found
    described = describe(stages, max(arguments.samples, 0), arguments.tokens, arguments.seconds)
    print(json_text(described) if arguments.json else render(described, color=shows_colour(sys.stdout)))
    return 0
