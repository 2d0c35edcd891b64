"""elastic plan: a run compiled for TPUs that are not here."""

from __future__ import annotations

import argparse
import sys

from elastic_jax.terminal import json_text
from elastic_jax.verbs import flags

SUMMARY = 'Compile a run for TPUs that are not here: memory, cycles, collectives, whether it fits, and what to change if not.'
EXAMPLE = 'elastic plan --config experiments/star_elastic_nano_v3.py:one_period --topology v5p:8x8x4 --programs short'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.config(parser)
    parser.add_argument('--topology', required=True, metavar='NAME', help='such as v5p:8x8x4: family and shape in chips')
    parser.add_argument(
        '--programs',
        metavar='NAMES',
        help='comma-separated (default: all): STAGE, STAGE/BUDGET (it alone), STAGE/masks, decode/BUDGET',
    )
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.config_file import load_config
    from elastic_jax.plan.planner import plan_run
    from elastic_jax.plan.table import show

    config = load_config(arguments.config, arguments.overrides)
    only = [name.strip() for name in arguments.programs.split(',')] if arguments.programs else ()
    say = lambda line: print(line, file=sys.stderr, flush=True)
    planned = plan_run(config, arguments.topology, only, say)
    print(json_text(planned.to_json()) if arguments.json else show(planned))
    return 0
