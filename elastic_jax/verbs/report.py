"""elastic report: a run as one page."""

from __future__ import annotations

import argparse

from elastic_jax.errors import UserError

SUMMARY = 'Write report.html and pareto.png.'
EXAMPLE = 'elastic report --workdir runs/quickstart'


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--workdir', required=True)
    parser.add_argument(
        '--baseline',
        action='append',
        default=[],
        metavar='NAME=WORKDIR',
        help='another run, whose trained budgets are shown beside this one; may be given again',
    )


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.evaluate.report import write_report

    baselines = {}
    for text in arguments.baseline:
        name, _, workdir = text.partition('=')
        if not name or not workdir:
            raise UserError(f'--baseline {text!r}: write NAME=WORKDIR, such as alone=runs/alone')
        baselines[name] = workdir
    print(write_report(arguments.workdir, baselines))
    return 0
