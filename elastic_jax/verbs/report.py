"""elastic report: a run as one page."""

from __future__ import annotations

import argparse

SUMMARY = 'Write report.html and pareto.png.'
EXAMPLE = 'elastic report --workdir runs/quickstart'


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--workdir', required=True)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.evaluate.report import write_report

    print(write_report(arguments.workdir))
    return 0
