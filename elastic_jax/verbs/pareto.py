"""elastic pareto: every size of a checkpoint against its cost."""

from __future__ import annotations

import argparse
import sys

from elastic_jax.terminal import json_text
from elastic_jax.verbs import flags

SUMMARY = 'Find the best sizes between the trained budgets: quality against cost, as a table, CSV, a picture and widths to slice.'
EXAMPLE = """elastic pareto --checkpoint runs/quickstart --out runs/quickstart/pareto --cost latency --per-layer

writes frontier.csv (every candidate), frontier.png, and widths.json: the frontier, cheapest first, for slice --widths"""


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    parser.add_argument('--out', required=True, metavar='DIR', help='folder for the three files; the report shows WORKDIR/pareto')
    parser.add_argument(
        '--cost',
        default='parameters',
        help='parameters (default), active (those that a token uses), memory (weights and caches), flops (of a token), or '
        'latency (of a decoding step on this device, from a table of measured layer times)',
    )
    parser.add_argument(
        '--data', action='append', default=[], metavar='FILE', help="text or JSONL to score on (default: the run's held-out data)"
    )
    parser.add_argument('--points', type=int, default=8, help='costs to aim at between the smallest budget and the parent')
    parser.add_argument('--evaluations', type=int, default=64, help='sizes to score in all (default: 64)')
    parser.add_argument('--per-layer', action='store_true', help='also sizes whose blocks differ, from half of the search')
    parser.add_argument('--axes', default='', help='comma-separated (default: those that the budgets cut)')
    parser.add_argument('--context', type=int, default=256, help='tokens per scored sequence (default: 256)')
    parser.add_argument('--batches', type=int, default=8, help='at most this many batches of 8 sequences (default: 8)')
    parser.add_argument('--seed', type=int, default=0, help='of the search')
    flags.json(parser)
    serving = parser.add_argument_group('what memory and latency are counted for')
    serving.add_argument('--rows', type=int, default=1, help='sequences served together (default: 1)')
    serving.add_argument('--cost-context', type=int, help="tokens that their caches hold (default: as the checkpoint's costs)")
    serving.add_argument('--dtype', help='bfloat16 (default) or float32 (default for latency on a CPU)')
    serving.add_argument(
        '--latency-table', metavar='FILE', help='layer times, kept and reused (default: layer_times.json in the cache folder)'
    )


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint
    from elastic_jax.evaluate.frontier_files import check_folder
    from elastic_jax.frontier import find_frontier

    checkpoint = open_checkpoint(arguments.checkpoint)
    check_folder(arguments.out)
    names = ('points', 'evaluations', 'per_layer', 'context', 'batches', 'seed', 'rows', 'cost_context', 'dtype', 'latency_table')
    frontier = find_frontier(
        checkpoint,
        arguments.cost,
        data=arguments.data,
        axes=tuple(filter(None, arguments.axes.split(','))),
        say=lambda line: print(line, file=sys.stderr, flush=True),
        **{name: getattr(arguments, name) for name in names},
    )
    frontier.write(arguments.out)
    print(json_text(frontier.to_json()) if arguments.json else frontier.table(arguments.out))
    print(f'wrote frontier.csv, frontier.png and widths.json to {arguments.out}', file=sys.stderr)
    return 0
